"""Samples the responses of an update with the program that learns from them: whole rows, again for each token.

The sampler's log-probabilities are then the trainer's, bit for bit: the same function, on rows of the same shape, and what
comes after a position does not change it. A response of R tokens costs R + 1 passes over whole rows, so this is for finding
out whether a run that misbehaves does so because the engine rounds differently. The tokens are the engine's, unless a random
number lies at the border of two tokens.

Shapes: B rows (prompts times responses), P prompt positions, R response positions, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.engine import rollouts
from jaxllm.engine.rollouts import Rollout
from jaxllm.engine.sampling import inverse_transform, next_logits, row_keys, uniform_numbers
from jaxllm.models import transformer
from jaxllm.rl.roles import RunSpec
from jaxllm.sharding import constrain, rows_like
from jaxllm.train import Program


class TrainerSampler:
    """(weights, prompts, words of the random key) -> Rollout, with the same arguments as `sampler.Sampler`."""

    name = "rollout"
    computes = True

    def __init__(self, spec: RunSpec, mesh: Any, flops: float):
        """mesh: of the policy; flops: of one pass over all rows."""
        self.mesh = mesh
        self._spec, self._flops = spec, flops
        self._start = jax.jit(functools.partial(_start, spec=spec))
        self._next = jax.jit(functools.partial(_next_token, spec=spec), donate_argnums=1)

    def __call__(self, weights: Any, prompts: Any, key_data: Any) -> Rollout:
        """prompts: {tokens int32[b, P], mask bool[b, P], index int32[b]}; key_data: uint32[2]."""
        rollout, keys = self._start(prompts, jnp.asarray(key_data))
        # The last pass draws nothing: it is there for the log-probability of the last token.
        for number in range(self._spec.config.sampling.max_new_tokens + 1):
            rollout = self._next(weights, rollout, keys, jnp.int32(number))
        return rollout

    def planned(self, weights: Any) -> tuple[list[Program], Rollout]:
        """What a call runs, with shapes instead of arrays, and the shapes of its result."""
        config = self._spec.config
        shape = jax.ShapeDtypeStruct
        rows, length = config.num_prompts, config.max_prompt_length
        prompts = {
            "tokens": shape((rows, length), jnp.int32),
            "mask": shape((rows, length), jnp.bool_),
            "index": shape((rows,), jnp.int32),
        }
        with jax.set_mesh(self.mesh):
            state = jax.eval_shape(self._start, prompts, shape((2,), jnp.uint32))
        rollout, keys = rows_like(self.mesh, state)
        times = config.sampling.max_new_tokens + 1
        arguments = (weights, rollout, keys, shape((), jnp.int32))
        program = Program(
            "rollout", self._next, arguments, {}, self._flops, times=times, mesh=self.mesh
        )
        return [program], rollout


def _start(prompts: Any, key_data: jax.Array, spec: RunSpec) -> tuple[Rollout, jax.Array]:
    """Rows without a response yet, and the words uint32[B, 2] of their random keys."""
    config = spec.config
    num, length = config.num_responses, config.sampling.max_new_tokens
    rows = functools.partial(jnp.repeat, repeats=num, axis=0)
    tokens, prompt_mask = rows(prompts["tokens"]), rows(prompts["mask"])
    B = tokens.shape[0]
    padding = jnp.full((B, length), spec.pad_id, jnp.int32)
    rollout = Rollout(
        jnp.concatenate([tokens, padding], axis=1),
        prompt_mask,
        mask=jnp.zeros((B, length), bool),
        logprobs=jnp.zeros((B, length), jnp.float32),
        finished=jnp.zeros(B, bool),
    )
    keys = row_keys(jax.random.wrap_key_data(key_data), prompts["index"], num)
    return jax.tree.map(_as_rows, rollout), _as_rows(jax.random.key_data(keys))


def _next_token(
    weights: Any, rollout: Rollout, keys: jax.Array, number: jax.Array, spec: RunSpec
) -> Rollout:
    """The rollout with token `number` int32[] of each response, and the log-probability of the one before it.

    Where `number` is R, there is no such token: it is past the end of the arrays, and nothing is written.
    """
    R = rollout.mask.shape[1]
    config, temperature = spec.model, spec.config.sampling.temperature
    hidden = rollouts.response_hidden(weights, rollout, config)
    stats = rollouts.hidden_logprobs(
        weights, hidden, rollout, config=config, temperature=temperature
    )
    # Only the newest: earlier ones were computed before the tokens after them were there, and stay as they were.
    newest = jnp.arange(R)[None] == number - 1
    logprobs = jnp.where(newest & rollout.mask, stats.logprob, rollout.logprobs)

    state = jax.lax.dynamic_index_in_dim(hidden, jnp.minimum(number, R - 1), 1, keepdims=False)
    unembed = transformer.head(weights).astype(state.dtype).T
    logits = next_logits(state, unembed, config.logit_softcap) / temperature
    uniform = uniform_numbers(jax.random.wrap_key_data(keys), number)
    token = inverse_transform(jax.nn.softmax(logits, axis=-1), uniform)

    alive = ~rollout.finished
    is_stop = (token[:, None] == jnp.array(spec.stop_ids, jnp.int32)[None]).any(1)
    written = jnp.where(alive, token, spec.pad_id)
    position = rollout.tokens.shape[1] - R + number
    rollout = rollout._replace(
        tokens=rollout.tokens.at[:, position].set(written, mode="drop"),
        mask=rollout.mask.at[:, number].set(alive, mode="drop"),
        finished=rollout.finished | (alive & is_stop & (number < R)),
        logprobs=logprobs,
    )
    return jax.tree.map(_as_rows, rollout)


def _as_rows(x: jax.Array) -> jax.Array:
    return constrain(x, "batch", *[None] * (x.ndim - 1))
