"""One update: sample responses, score them, compute experience, learn from it in minibatches.

The update is written once. Training calls it with `run = call`, which runs each program; `jaxllm plan` calls it with
a recorder instead, which notes the program and returns the shapes of its results (`planned`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import losses
from jaxllm.data.loader import PromptExample
from jaxllm.engine.rollouts import Rollout
from jaxllm.losses import Metrics
from jaxllm.rl.config import PPOConfig
from jaxllm.rl.dynamic_sampling import Sampled, fill
from jaxllm.rl.experience import Experience, StepRewards
from jaxllm.rl.layouts import MeshProgram
from jaxllm.rl.programs import UpdatePrograms
from jaxllm.rl.roles import FrozenModels, PPOState, RunSpec
from jaxllm.train import TrainState

# (program, *arguments, **resident arguments) -> its results
RunProgram = Callable[..., Any]
# (run, rollout, prompts of its rows) -> (scores float32[B] before they are shaped, the part of them that is paid where steps
# end, the mean of each term)
Scorer = Callable[
    [RunProgram, Rollout, Sequence[PromptExample]],
    tuple[jax.Array, StepRewards | None, Metrics],
]


def call(program: MeshProgram, *arguments: Any, **resident: Any) -> Any:
    """Run a program. In a profile it has its name: rollout, reference, actor, ..."""
    with jax.profiler.TraceAnnotation(program.name):
        return program(*arguments, **resident)


class HostWork(NamedTuple):
    """What an update does on the host, between its programs."""

    prompts_of: Callable[[Any], Sequence[PromptExample]]
    """Batch -> the prompt of each response."""
    more_prompts: Callable[[int, int], Any] | None
    """(number of the update, round of sampling) -> batch of prompts; None where each update has one round."""
    score: Scorer
    end_responses: Callable[[Rollout], Rollout]
    """Cuts responses at the configured strings."""
    ptx_rows_at: Callable[[Any], Any] | None
    """Number of the optimizer update -> rows to learn next tokens from; None without PPO-ptx."""
    ends_early: Callable[[Metrics], bool]
    """Whether an update should end after the minibatch with these metrics."""
    log: Callable[[int, Rollout, Sequence[PromptExample], jax.Array], None] | None
    """(number of the update, rollout, prompts of its rows, scores): writes a few responses."""


def collect(
    config: PPOConfig,
    run: RunProgram,
    programs: UpdatePrograms,
    frozen: FrozenModels,
    host: HostWork,
    state: PPOState,
    batch: Any,
    key_of: Callable[[int], Any],
) -> tuple[Experience, losses.Moments, Metrics]:
    """Samples responses to a batch of prompts and turns them into experience.

    Args:
      batch: {tokens int32[b, P], mask bool[b, P], index int32[b], prompt int32[b]} of b prompts.
      key_of: round of sampling -> uint32[2], the words of its random key.
    """
    actor = (state.actor.params, frozen.actor_base)
    # The sampler may live on another mesh, where it needs its own copy of the weights.
    weights = run(programs.weights, *actor)

    def sample(batch: Any, key_data: Any) -> tuple[Sampled, Metrics]:
        token_rows = {name: batch[name] for name in ("tokens", "mask", "index")}
        rollout = host.end_responses(run(programs.rollout, weights, token_rows, key_data))
        prompts = host.prompts_of(batch)
        # Scored after stop strings are cut: a reward must not see text that the response does not have.
        raw_scores, steps, metrics = host.score(run, rollout, prompts)
        return Sampled(rollout, raw_scores, prompts, steps), metrics

    sampled, reward_metrics = sample(batch, key_of(0))
    more_prompts = host.more_prompts
    if more_prompts:
        number = int(state.step)
        sampled, reward_metrics = fill(
            sampled,
            reward_metrics,
            lambda round_: sample(more_prompts(number, round_), key_of(round_)),
            functools.partial(run, programs.exchange),
            config,
        )
    rollout, raw_scores, prompts, steps = sampled
    scores, moments, score_metrics = run(
        programs.shape_scores, raw_scores, rollout.finished, state.moments
    )
    # A shared trunk computes its values with the experience, in one forward pass.
    values = {}
    if programs.critic_step:
        values = run(programs.values, (state.critic.params, frozen.critic_base), rollout)
    # Under the policy as it started, at the same temperature, so that equal policies have a KL of 0.
    ref_logprobs = run(programs.reference, frozen.ref, rollout)
    experience, metrics = run(
        programs.experience, *actor, rollout, ref_logprobs, values, scores, state.kl_coef, steps
    )
    experience = experience._replace(
        teacher_hidden=teacher_hidden(run, programs, frozen, rollout),
    )
    if host.log:
        host.log(int(state.step) + 1, rollout, prompts, scores)
    return experience, moments, {**metrics, **reward_metrics, **score_metrics}


def teacher_hidden(
    run: RunProgram, programs: UpdatePrograms, frozen: FrozenModels, rollout: Rollout
) -> tuple[jax.Array, ...]:
    """Each teacher's states [B, R, D] in which the response tokens were chosen."""
    pairs = zip(programs.teachers, frozen.teachers, strict=True)
    return tuple(run(program, params, rollout) for program, params in pairs)


def optimize(
    run: RunProgram,
    programs: UpdatePrograms,
    frozen: FrozenModels,
    host: HostWork,
    actor: TrainState,
    critic: Any,
    experience: Experience,
    minibatches: np.ndarray,
) -> tuple[TrainState, Any, list[Metrics]]:
    """Passes over the experience: (new actor, new critic, metrics of each minibatch).

    minibatches: int32[updates, size], the rows of each minibatch.
    """
    collected: list[Metrics] = []
    for rows in minibatches:
        # The experience does not change: every epoch compares with the policy that sampled it.
        minibatch = run(programs.take, experience, rows)
        learned_from = minibatch
        if host.ptx_rows_at:
            learned_from = (minibatch, host.ptx_rows_at(actor.step))
        actor, metrics = run(
            programs.actor_step,
            actor,
            learned_from,
            base=frozen.actor_base,
            teacher_heads=frozen.teacher_heads,
        )
        if programs.critic_step:
            critic, critic_metrics = run(
                programs.critic_step, critic, minibatch, base=frozen.critic_base
            )
            # Both models report a gradient norm and skipped updates.
            metrics |= _of_critic(critic_metrics)
        collected.append(metrics)
        # After the update, not before: the minibatch that passes the limit has been learned from.
        if host.ends_early(metrics):
            break
    return actor, critic, collected


def _of_critic(metrics: Metrics) -> Metrics:
    """The critic's metrics under names that do not collide with the policy's: grad_norm becomes critic_grad_norm."""
    renamed = {}
    for name, pair in metrics.items():
        renamed[name if name.startswith("value") else f"critic_{name}"] = pair
    return renamed


def make_step(
    spec: RunSpec,
    programs: UpdatePrograms,
    frozen: FrozenModels,
    host: HostWork,
    stage: str,
) -> Callable[[PPOState, Any], tuple[PPOState, Metrics]]:
    """(state, batch of prompts) -> (state, metrics), the step that `train.fit` repeats.

    Every random choice is a function of (seed, state.step, round of sampling), so that a resumed run repeats it: the
    responses, and a fresh permutation for each epoch.
    """
    config = spec.config

    def step(state: PPOState, batch: Any) -> tuple[PPOState, Metrics]:
        number = int(state.step)
        experience, moments, metrics = collect(
            config,
            call,
            programs,
            frozen,
            host,
            state,
            batch,
            functools.partial(key_words, spec.seed, number),
        )
        actor, critic, collected = optimize(
            call,
            programs,
            frozen,
            host,
            state.actor,
            state.critic,
            experience,
            minibatch_rows(spec, number),
        )
        # kl_coef is what this update used; the adapted one is for the next.
        new_state = PPOState(
            step=state.step + 1,
            actor=actor,
            critic=critic,
            kl_coef=_next_kl_coef(config, state.kl_coef, metrics["kl"]),
            ema=_move(state.ema, actor.params, config.ema_decay) if config.ema_decay else {},
            moments=moments,
        )
        metrics |= {"kl_coef": (state.kl_coef, jnp.ones(()))} | _summed(collected)
        return new_state, {f"{stage}/{name}": pair for name, pair in metrics.items()}

    return step


def key_words(seed: int, number: int, round_: int = 0) -> np.ndarray:
    """The random key of update `number` and round of sampling as uint32[2] on the host, from where it can go to any mesh."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    if round_:
        key = jax.random.fold_in(key, round_)
    return np.asarray(jax.random.key_data(key))


def minibatch_rows(spec: RunSpec, number: int) -> np.ndarray:
    """Rows int32[updates, size] of the minibatches of update `number`.

    Each epoch is a fresh permutation. With four responses, two minibatches and two epochs, for example

        [[2 0]  [3 1]     first epoch
         [1 2]  [0 3]]    second epoch
    """
    config = spec.config
    orders = []
    for epoch in range(config.num_epochs):
        # A generator for each epoch: the order does not depend on what ran before it.
        rng = np.random.default_rng([spec.seed, number, epoch])
        orders.append(rng.permutation(config.batch_size))
    return np.concatenate(orders).reshape(-1, config.minibatch_size).astype(np.int32)


def passes_kl_limit(metrics: Metrics, limit: float) -> bool:
    """Whether a minibatch's approximate KL to the old policy, in nats per token, exceeds the limit; 0: never."""
    if not limit:
        return False
    total, tokens = metrics["approx_kl"]
    return float(total) / max(float(tokens), 1.0) > limit


def _next_kl_coef(config: PPOConfig, kl_coef: jax.Array, kl: tuple[jax.Array, jax.Array]) -> Any:
    """The coefficient of the next update. kl: (sum of nats, responses)."""
    # Without a target the coefficient never changes.
    if not config.kl_target:
        return kl_coef
    return losses.adapt_kl_coef(
        kl_coef,
        kl[0] / kl[1],
        target=config.kl_target,
        horizon=config.kl_horizon,
        batch_size=config.batch_size,
    )


@jax.jit
def _move(ema: Any, params: Any, decay: float) -> Any:
    """The moving average after one more update."""
    return jax.tree.map(lambda e, p: e * decay + p * (1.0 - decay), ema, params)


def _summed(collected: list[Metrics]) -> Metrics:
    """Metrics of all minibatches together."""

    def add(*terms: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, terms)

    # Sums and weights are added, not the means: minibatches differ in their number of tokens.
    metrics = jax.tree.map(add, *collected)
    metrics["minibatches"] = (jnp.float32(len(collected)), jnp.ones(()))
    # Minibatches skipped in a row by the end: the policy's, or the critic's where that is more.
    last = collected[-1]
    streaks = [last[name][0] for name in ("skip_streak", "critic_skip_streak") if name in last]
    metrics["skip_streak"] = (functools.reduce(jnp.maximum, streaks), jnp.ones(()))
    return metrics
