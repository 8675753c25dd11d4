"""Where a policy gradient comes to rest, in float64: the expected update of a table of logits, followed until it is zero.

A table has a row of logits for each prefix of a response, so that its policies are all there are. An objective's expected
update is a sum over all responses y and their tokens a in states s,

    sum_y q(y) c(y) sum_t (w(y, t) A(y) - beta slope(s, a)) (onehot(a) - pi(. | s))

with the sampler's probability q, a token's share c (1, or 1 / length), its importance weight w, the expected advantage A
and the slope of the KL's estimate: log pi / ref for k2, 1 - ref / pi for k3. A zero of it is one of any network that can
represent every policy.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Policy(NamedTuple):
    """A table's policy on the responses of a world."""

    each: np.ndarray  # float64[N, R]: log-probability of each token, 0 beyond the end
    steps: np.ndarray  # float64[S, V]: log-probabilities in each state

    @property
    def probs(self) -> np.ndarray:
        """float64[N] of whole responses."""
        return np.exp(self.each.sum(1))


class Table:
    """The states of a world's responses (`worlds.Responses`)."""

    def __init__(self, space):
        prefixes = sorted({row[:n] for row in space.rows for n in range(len(row))})
        self.mask = space.mask
        self.length = self.mask.sum(1)
        self.tokens = space.tokens
        self.state = np.zeros(space.tokens.shape, int)
        for i, row in enumerate(space.rows):
            for t in range(len(row)):
                self.state[i, t] = prefixes.index(row[:t])
        self.num_states = len(prefixes)
        self.vocab = int(space.tokens.max()) + 1

    def policy(self, logits: np.ndarray) -> Policy:
        steps = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return Policy(np.where(self.mask, steps[self.state, self.tokens], 0.0), steps)

    def logits_of(self, probs: np.ndarray) -> np.ndarray:
        """Logits float64[S, V] of a policy given by the probabilities float64[N] of its responses."""
        mass = np.zeros((self.num_states, self.vocab))
        for t in range(self.mask.shape[1]):
            on = self.mask[:, t]
            np.add.at(mass, (self.state[on, t], self.tokens[on, t]), probs[on])
        return np.log(mass)

    def rest(
        self,
        ref: np.ndarray,
        advantage: Callable[[Policy, Policy], np.ndarray],
        *,
        kl_loss_coef: float = 0.0,
        kl_loss: str = "k2",
        loss_mean: str = "token",
        sampler: Callable[[np.ndarray], np.ndarray] = lambda logits: logits,
        correction: str = "off",
        kept: Callable[[Policy], np.ndarray] = lambda policy: np.ones(()),
        rate: float = 0.5,
    ) -> np.ndarray:
        """Probabilities float64[N] of the fixed point.

        Args:
          ref: float64[N], the reference's.
          advantage: (policy, sampler's) -> the expected advantage float64[N] or float64[N, R].
          sampler: the policy's logits -> the sampler's.
          kept: the policy -> the probability float64[N] that a response is learned from; where it is less than 1, the
            advantage of what is dropped is zero, and only the KL's estimate misses it.
        """
        start = self.logits_of(ref)
        ref_policy, logits = self.policy(start), start.copy()
        share = 1.0 / self.length if loss_mean == "response" else np.ones(len(ref))
        for _ in range(10_000):
            policy, q = self.policy(logits), self.policy(sampler(logits))
            log_weight = policy.each - q.each
            if correction == "sequence":
                log_weight = np.broadcast_to(log_weight.sum(1, keepdims=True), log_weight.shape)
            weight = np.exp(log_weight) if correction != "off" else np.ones_like(log_weight)
            log_ratio = policy.each - ref_policy.each
            slope = log_ratio if kl_loss == "k2" else 1.0 - np.exp(-log_ratio)
            gain = advantage(policy, q)
            gain = gain[:, None] if gain.ndim == 1 else gain
            pull = gain - kl_loss_coef * np.reshape(kept(policy), (-1, 1)) * slope
            each = (q.probs * share)[:, None] * weight * pull
            update, visits = np.zeros_like(logits), np.full(self.num_states, 1e-12)
            for t in range(self.mask.shape[1]):
                on = self.mask[:, t]
                states = self.state[on, t]
                np.add.at(update, (states, self.tokens[on, t]), each[on, t])
                np.subtract.at(update, states, each[on, t, None] * np.exp(policy.steps[states]))
                np.add.at(visits, states, q.probs[on])
            # What is rare learns as fast as the rest (a natural gradient): that moves no zero.
            step = update / (visits[:, None] * np.exp(policy.steps))
            logits = logits + rate * step
            if np.abs(step).max() < 1e-7:
                return self.policy(logits).probs
        raise AssertionError("the update does not vanish")


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the sum of absolute differences."""
    return float(0.5 * np.abs(p - q).sum())
