"""The probability of each token of a given text, from the weights that an engine decodes with.

Shapes: C blocks of the text on each shard of a batch, S positions of a block, A alternatives, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.engine import inputs
from jaxllm.engine.geometry import Geometry
from jaxllm.engine.request import Draw
from jaxllm.engine.row_sampling import Drawn, draw_of, likeliest
from jaxllm.engine.sampling import next_logits
from jaxllm.models import decode
from jaxllm.models.block_cache import View
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.transfer import fetch, place
from jaxllm.sharding import activation, replicated


def score(
    params: Any, geometry: Geometry, ids: Sequence[int], num_alternatives: int = 0
) -> list[Draw]:
    """What the model says of every token but the first, given those before it, at temperature 1.

    Args:
      params: as the engine has them, from `geometry.unstacking`.
      geometry: of the engine.
      ids: at most one more than the context holds: the last one is only looked at.
      num_alternatives: how many of the likeliest tokens are reported for each.
    """
    count = len(ids) - 1
    if count < 1:
        return []
    run = _compiled(geometry.config, num_alternatives, geometry.mesh)
    blocks = _blocks_of(ids, geometry.settings.block, geometry.num_shards)
    placed = place(blocks, activation(geometry.mesh, "batch"))
    arrays: Any = (np.asarray(ids[1:]), *fetch(run(params, *placed)))
    drawn = Drawn(*arrays)
    return [draw_of(drawn, i, num_alternatives) for i in range(count)]


def _blocks_of(
    ids: Sequence[int], size: int, num_shards: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [shards * C, S], targets, positions, tables [shards * C, C]); only the first shard has a text.

    Ids a b c d e f in blocks of 4:

        tokens      a b c d | e . . .
        targets     b c d e | f . . .
        positions   0 1 2 3 | 4 - - -
    """
    count = len(ids) - 1
    # 1, 4, 16, ...: few programs to compile.
    blocks = inputs.room_for(-(-count // size), least=1)
    tokens = np.zeros((num_shards, blocks * size), np.int32)
    targets = np.zeros_like(tokens)
    positions = np.full_like(tokens, -1)
    tokens[0, :count], targets[0, :count] = ids[:-1], ids[1:]
    positions[0, :count] = range(count)
    tables = np.broadcast_to(np.arange(blocks, dtype=np.int32), (num_shards * blocks, blocks))
    by_block = (-1, size)
    return tokens.reshape(by_block), targets.reshape(by_block), positions.reshape(by_block), tables


@functools.lru_cache(maxsize=32)
def _compiled(config: ModelConfig, num_alternatives: int, mesh: jax.sharding.Mesh) -> Any:
    run = functools.partial(_run, config=config, num_alternatives=num_alternatives)
    return jax.jit(run, out_shardings=replicated(mesh))


def _run(
    params: Any,
    tokens: jax.Array,
    targets: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    *,
    config: ModelConfig,
    num_alternatives: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log-probabilities of the targets [all positions], the likeliest tokens [..., A], theirs)."""
    cache = decode.empty_blocks(config, *tokens.shape)
    view = View(positions, tables, None)
    hidden, _ = decode.apply_in_blocks(params, config, tokens, view, cache)

    def of_block(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        states, wanted = block
        logits = next_logits(states, params["unembed"], config.logit_softcap)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        own = jnp.take_along_axis(logprobs, wanted[:, None], axis=1)[:, 0]
        return own, *likeliest(logprobs, num_alternatives)

    # Block by block: the logits of a long text and a large vocabulary would not fit the memory.
    own, ids, values = jax.lax.map(of_block, (hidden, targets))
    by_position = (own.size, num_alternatives)
    return own.reshape(-1), ids.reshape(by_position), values.reshape(by_position)
