"""How the next token is sampled from the logits: temperature, top-k, nucleus, and one random number per row."""

import math

import jax
import jax.numpy as jnp

from jaxllm import output_layer
from jaxllm.sharding import constrain

_BLOCK = 128  # tokens in a block of `inverse_transform`


def row_keys(key: jax.Array, prompt_index: jax.Array, num_samples: int) -> jax.Array:
    """One key per row, prompt-major: keys [P * num_samples] from the prompts' indices int32[P].

    A key depends on nothing but (key, the prompt's index, the number of the sample), whatever else is in the batch.
    """
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    samples = jnp.arange(num_samples, dtype=jnp.int32)
    by_prompt = fold(key, prompt_index)
    return jax.vmap(lambda key: fold(key, samples))(by_prompt).reshape(-1)


def next_logits(hidden: jax.Array, unembed: jax.Array, softcap: float) -> jax.Array:
    """Logits float32[B, V] of the token after each hidden state [B, D]; unembed [D, V]; softcap: 0: none."""
    logits = jnp.einsum("bd,dv->bv", hidden, unembed, preferred_element_type=jnp.float32)
    # Pinned twice, so that XLA gathers the logits and not the matrix, which it would do for each token.
    logits = constrain(logits, "batch", "vocab")
    return output_layer.softcap(constrain(logits, "batch", None), softcap)


def uniform_numbers(keys: jax.Array, step: jax.Array) -> jax.Array:
    """One number float32[B] in [0, 1) for each row's key and the number of its token, int32[] or int32[B]."""
    steps = jnp.broadcast_to(step, keys.shape)
    return jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(keys, steps))


def keep_likely(logprobs: jax.Array, top_k: int, top_p: float, min_p: float = 0.0) -> jax.Array:
    """Log-probabilities float32[B, V] with all but the top-k, then the nucleus (Holtzman et al. 2020), at -inf.

    Last, what has less than min_p times the probability of the likeliest token goes too (Nguyen et al. 2024).

    The nucleus is the smallest set of most likely tokens whose probability, among those left by top-k, reaches top_p; it
    always holds the most likely one. With top_p 0.7:

        probability   0.5  0.25 0.15 0.1
        before it     0    0.5  0.75 0.9      the sum of the more likely ones
        kept          y    y    -    -        where that sum is below top_p
    """
    # Tokens as likely as the k-th are all kept.
    if top_k and top_k < logprobs.shape[-1]:
        floor = jax.lax.top_k(logprobs, top_k)[0][:, -1:]
        logprobs = jnp.where(logprobs < floor, -jnp.inf, logprobs)
    if top_p < 1.0:
        # Most likely first; negated, since sort is ascending.
        ordered = -jnp.sort(-jax.nn.softmax(logprobs, axis=-1), axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        last = (before < top_p).astype(jnp.int32).sum(-1, keepdims=True) - 1
        # At least the first: a top_p below 1e-45 is 0 in float32.
        floor = jnp.take_along_axis(ordered, jnp.maximum(last, 0), axis=-1)
        logprobs = jnp.where(jax.nn.softmax(logprobs, axis=-1) < floor, -jnp.inf, logprobs)
    if min_p:
        floor = logprobs.max(-1, keepdims=True) + math.log(min_p)
        logprobs = jnp.where(logprobs < floor, -jnp.inf, logprobs)
    return logprobs


def inverse_transform(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Samples an index in proportion to weights float32[B, V] by inverse transform; uniform: float32[B] in [0, 1).

    It chooses the first index whose running sum is above uniform * total. With a total of 10 and uniform 0.45:

        weights        2 0 3 4 1
        running sum    2 2 5 9 10
        above 4.5          ^            index 2

    First a block of 128 is chosen, then an index in it. That takes one random number per row, where Gumbel noise takes
    one for each of V tokens, and keeps sums in float32 short. An index without weight is never chosen. Returns int32[B].
    """
    padded = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % _BLOCK)))
    blocks = padded.reshape(weights.shape[0], -1, _BLOCK)
    totals = blocks.sum(-1)
    ends = jnp.cumsum(totals, axis=-1)
    target = (uniform * ends[:, -1])[:, None]
    block, before = _first_above(ends, target, totals)
    # [B, 128]: the weights of the block chosen.
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    offset, _ = _first_above(jnp.cumsum(inside, axis=-1), target - before[:, None], inside)
    return (block * _BLOCK + offset).astype(jnp.int32)


def _first_above(
    ends: jax.Array, target: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(int32[B], the first index with weight whose running sum is above the target; float32[B], the sum before it).

    Rounding may leave no such index; then it is that of the largest weight. ends: running sums of the weights, both
    float32[B, n]; target: float32[B, 1].
    """
    # An index without weight has the running sum of the one before it.
    above = (ends > target) & (weights > 0)
    index = jnp.where(above.any(-1), jnp.argmax(above, axis=-1), jnp.argmax(weights, axis=-1))

    def at_index(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]

    return index, at_index(ends) - at_index(weights)
