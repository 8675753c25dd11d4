"""What the engine runs on devices: a few decoding steps, and the prefill of a few blocks of prompts.

Shapes: R rows over all shards of a batch, M blocks of a table, C chunks of prompts, S positions of a block, D model width,
A alternatives.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.row_sampling import Asked, Drawn, History, RowRules, draw
from jaxllm.models import block_cache, decode
from jaxllm.models.block_cache import LayerBlocks, Owners, View, cache_axes, copy_blocks
from jaxllm.models.config import ModelConfig
from jaxllm.models.decode import BlockCache
from jaxllm.sharding import ACT_RULES, constrain, on_each_device, spec


class Rows(NamedTuple):
    """What a step must know of each row; the first dimension of all arrays is R."""

    token: Any  # int32: the newest token, which is not in the cache yet
    position: Any  # int32: of this token in its row; -1: an empty row
    number: Any  # int32: of the token that is drawn next, in its response
    remaining: Any  # int32: how many more tokens may be drawn
    keys: Any  # uint32[R, 2]: words of the random keys
    stops: Any  # int32[R, any]: tokens that end the response, filled up with -1
    rules: RowRules
    history: History
    tables: Any  # int32[R, M]


class Chunks(NamedTuple):
    """Blocks of prompts that are prefilled, and the rows that start after them."""

    tokens: Any  # int32[C, S]
    positions: Any  # int32[C, S]; -1: not a token
    tables: Any  # int32[C, M]: of the chunk's row
    # For each row of `Rows`, int32[R]: the index of its prompt's last token among the C * S tokens of its shard, -1: none
    source: Any


class Copies(NamedTuple):
    """Blocks that become copies of others."""

    source: Any  # int32[R]; -1: none
    target: Any  # int32[R]


class Settings(NamedTuple):
    """What programs are compiled for."""

    config: ModelConfig  # from `decode.decoding_config`
    common: SamplingConfig | None  # what all rows share (`common_rules`)
    num_alternatives: int
    steps: int  # most decoding steps of a call


def decode_steps(
    params: Any,
    cache: BlockCache,
    rows: Rows,
    owners: Owners,
    count: Any,
    asked: Asked | None = None,
    *,
    settings: Settings,
) -> tuple[Drawn, BlockCache]:
    """Decodes `count` int32[] tokens of each row, at most `settings.steps`; arrays of the result are [R, steps, ...].

    A row that ends earlier goes on as an empty one. asked: of programs for all kinds of rows.
    """

    def one(step: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        rows, cache, all_drawn = state
        view = View(rows.position[:, None], rows.tables, owners)
        hidden, cache = decode.apply_in_blocks(
            params, settings.config, rows.token[:, None], view, cache
        )
        drawn = _draw(params, hidden[:, 0], rows, asked, settings)
        all_drawn = jax.tree.map(lambda x, new: x.at[:, step].set(new), all_drawn, drawn)
        return _advance(rows, drawn.token), cache, all_drawn

    R = rows.token.shape[0]
    shape = (R, settings.steps)
    empty = Drawn(
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, settings.num_alternatives), jnp.int32),
        jnp.zeros((*shape, settings.num_alternatives), jnp.float32),
    )
    # No condition on the rows: devices need not agree after every step.
    _, cache, all_drawn = jax.lax.fori_loop(0, count, one, (rows, cache, empty))
    return all_drawn, cache


def _draw(
    params: Any, hidden: jax.Array, rows: Rows, asked: Asked | None, settings: Settings
) -> Drawn:
    return draw(
        hidden,
        jax.random.wrap_key_data(rows.keys),
        rows.number,
        params["unembed"],
        settings.config.logit_softcap,
        rows.rules,
        rows.history,
        settings.common,
        settings.num_alternatives,
        asked,
    )


def _advance(rows: Rows, token: jax.Array) -> Rows:
    """The rows after a token was drawn; those that it ends are empty."""
    remaining = rows.remaining - 1
    ended = (rows.position < 0) | (remaining <= 0) | (token[:, None] == rows.stops).any(1)
    tokens = rows.history.tokens
    if tokens.shape[1]:
        tokens = tokens.at[jnp.arange(len(token)), rows.position + 1].set(token, mode="drop")
    return rows._replace(
        token=token,
        history=rows.history._replace(tokens=tokens),
        position=jnp.where(ended, -1, rows.position + 1),
        number=rows.number + 1,
        remaining=remaining,
    )


def prefill(
    params: Any,
    cache: BlockCache,
    chunks: Chunks,
    rows: Rows,
    asked: Asked | None = None,
    *,
    settings: Settings,
) -> tuple[Drawn, BlockCache]:
    """Prefills chunks of prompts, and draws the first token of rows that start; arrays of the result are [R, ...]."""
    view = View(chunks.positions, chunks.tables, None)
    hidden, cache = decode.apply_in_blocks(params, settings.config, chunks.tokens, view, cache)
    last = _last_states(hidden, chunks.source)
    return _draw(params, last, rows, asked, settings), cache


def _last_states(hidden: jax.Array, source: jax.Array) -> jax.Array:
    """The states [R, D] of the tokens `source` int32[R] among hidden [C, S, D], shard by shard."""

    def pick(hidden: jax.Array, source: jax.Array) -> jax.Array:
        return hidden.reshape(-1, hidden.shape[-1])[jnp.maximum(source, 0)]

    hidden = constrain(hidden, "batch", None, None)
    rows = spec(("batch",), ACT_RULES)
    return on_each_device(pick, (rows, rows), rows)(hidden, source)


# A program of its own: in that of the prefill, XLA would copy the whole cache.
@functools.partial(jax.jit, donate_argnums=0)
def copy(cache: BlockCache, copies: Copies) -> BlockCache:
    """The cache with these copies; it is updated in place."""
    rows = spec(("batch",), ACT_RULES)

    def run(blocks: LayerBlocks) -> LayerBlocks:
        own = spec(cache_axes(blocks.k), ACT_RULES)
        return on_each_device(copy_blocks, (own, rows, rows), own)(blocks, *copies)

    return tuple(map(run, cache))


@functools.partial(jax.jit, static_argnums=1)
def resize(cache: BlockCache, count: int) -> BlockCache:
    """The cache with `count` blocks on each shard."""

    def run(blocks: LayerBlocks) -> LayerBlocks:
        own = spec(cache_axes(blocks.k), ACT_RULES)
        resize_own = functools.partial(block_cache.resize, count=count)
        return on_each_device(resize_own, (own,), own)(blocks)

    return tuple(map(run, cache))


@functools.lru_cache(maxsize=32)
def compiled(function: Callable[..., Any], settings: Settings, mesh: jax.sharding.Mesh) -> Any:
    """`decode_steps` or `prefill` for these settings. The cache is updated in place."""
    whole = jax.sharding.NamedSharding(mesh, PartitionSpec())
    run = functools.partial(function, settings=settings)
    # What is drawn goes to every device: all processes read it.
    return jax.jit(run, donate_argnums=1, out_shardings=(whole, None))


def common_rules(samplings: Collection[SamplingConfig]) -> SamplingConfig | None:
    """The rules that programs are compiled for, if all rows have the same; None: each row has its own.

    Lengths, temperatures and penalties are no matter of the program, but for a temperature of 0.
    """
    kinds = {
        SamplingConfig(
            max_new_tokens=1,
            temperature=0.0 if sampling.greedy else 1.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        for sampling in samplings
    }
    return kinds.pop() if len(kinds) == 1 else None
