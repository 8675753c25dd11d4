"""A cache of keys and values in blocks, and attention of new tokens to it.

The blocks of all rows lie in one pool. A row's table says which blocks it has, in order; with blocks of 4 positions:

    pool      block  0      1      2      3      4
    row 0     table  2 0         positions 0 1 2 3 | 4 5 . .
    row 1     table  4 1 3       positions 0 1 2 3 | 4 5 6 7 | 8 . . .

Rows may share blocks whose tokens are the same.

Single new tokens (T = 1) visit the pool in its own order: every block is multiplied with the query of its row, in place,
and a row's partial results are put together. Several new tokens per row gather their row's blocks, one after the other.

Every row is computed by itself: its result does not depend on what else is in the pool, nor on where its blocks are.

Shapes: R rows, T new tokens of each, N query heads, K key heads, G = N / K, H head size, W size of a value, M blocks of
a table, S positions of a block, n blocks of the pool on a device.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jaxllm.models.attention import UseWindow
from jaxllm.sharding import ACT_RULES, on_each_device, platform, spec

_MASKED = -1e30  # a large finite number: a row that sees nothing would otherwise be NaN
PAIRS = 16  # pairs of a row and a shared block that are computed at a time


class LayerBlocks(NamedTuple):
    """Keys [n, K, H, S] and values [n, K, S, W] of a layer, or [layers, n, ...] of several layers.

    The dimension that a product sums over is never the last one, so that sums are over whole vectors. Latent attention
    has one head of keys, and values that are part of them: W = 0.
    """

    k: Array
    v: Array


class Owners(NamedTuple):
    """Which row each block of the pool belongs to. Numbers of rows and blocks are local to a shard of the batch."""

    row: Any  # int32[n]: the row that reads the block; R: none does
    number: Any  # int32[n]: the block's place in the row's table
    # Further rows that read a block: the row (R: none), the block, and its place in the row's table, int32[X] each.
    shared_row: Any
    shared_block: Any
    shared_number: Any


class View(NamedTuple):
    """Where new tokens go, and what they see."""

    positions: Array  # int32[R, T]: of the new tokens in their rows; -1: not a token
    tables: Array  # int32[R, M]: blocks of the rows, local to a shard of the batch
    owners: Owners | None  # needed for single tokens


class Rules(NamedTuple):
    """How scores are computed."""

    scale: float
    softcap: float  # 0: none
    window: int  # how many positions a token sees; 0: all
    use_window: UseWindow  # whether this layer has the window


class _Partial(NamedTuple):
    """Softmax and product with values of a part of the keys, which are put together later."""

    highest: Array  # [...]: the highest score
    total: Array  # [...]: sum of exp(score - highest)
    mixed: Array  # [..., W]: sum of exp(score - highest) * value


def extend_and_attend(
    q: Array,
    k: Array,
    v: Array | None,
    cache: LayerBlocks,
    view: View,
    rules: Rules,
    layer: Array | None,
    value_size: int,
) -> tuple[Array, LayerBlocks]:
    """Writes keys and values of new tokens into their rows' blocks, and attends to all of the rows.

    Args:
      q: [R, T, N, H].
      k: [R, T, K, H].
      v: [R, T, K, W]; None where a value is the first `value_size` elements of its key.
      cache: of this layer, or of all layers of a group.
      view: where the tokens go.
      rules: of the scores.
      layer: index of the layer in a cache of several layers, int32[]; None: the cache of a single layer.
      value_size: W.

    Returns:
      ([R, T, N, W] in q's dtype, the cache with the new tokens).
    """
    run = functools.partial(_on_a_device, rules=rules, value_size=value_size)
    queries = spec(("batch", None, "heads", None), ACT_RULES)
    new = spec(("batch", None, _head_axis(k.shape[2]), None), ACT_RULES)
    blocks = spec(cache_axes(cache.k), ACT_RULES)
    rows = spec(("batch",), ACT_RULES)
    everywhere = PartitionSpec()
    specs = (queries, new, new, blocks, rows, everywhere)
    on_device = on_each_device(run, specs, (queries, blocks))
    return on_device(q, k, v, cache, view, layer)


def cache_axes(cache: Any) -> tuple[str | None, ...]:
    """The logical axes of keys or values (or their shapes), of one layer or of several."""
    stacked = (None,) * (cache.ndim - 4)
    return (*stacked, "batch", _head_axis(cache.shape[-3]), None, None)


def _head_axis(num_heads: int) -> str | None:
    # A single head, as in latent attention, is on every device of the tensor axis.
    return "kv_heads" if num_heads > 1 else None


def _on_a_device(
    q: Array,
    k: Array,
    v: Array | None,
    cache: LayerBlocks,
    view: View,
    layer: Array | None,
    rules: Rules,
    value_size: int,
) -> tuple[Array, LayerBlocks]:
    """`extend_and_attend` with the rows, heads and blocks of one device."""
    places = _places(cache.v, view, layer)
    cache = LayerBlocks(
        _write(cache.k, k, places, last=True),
        cache.v if v is None else _write(cache.v, v, places),
    )
    keys = cache.k if layer is None else cache.k[layer]
    if v is None:
        values = keys[:, :, :value_size].swapaxes(-1, -2)
    else:
        values = cache.v if layer is None else cache.v[layer]
    if q.shape[1] == 1 and view.owners is not None:
        return _attend_in_place(q, keys, values, view, rules), cache
    return _attend_by_table(q, keys, values, view, rules), cache


class _Places(NamedTuple):
    """Where new tokens go."""

    layer: Array | None
    block: Array  # int32[R * T]: beyond the pool for what is not a token
    offset: Array  # int32[R * T]: in the block


def _places(values: Array, view: View, layer: Array | None) -> _Places:
    count, size = values.shape[-4], values.shape[-2]
    positions = view.positions
    block = jnp.take_along_axis(view.tables, jnp.maximum(positions, 0) // size, axis=1)
    block = jnp.where(positions >= 0, block, count)
    return _Places(layer, block.reshape(-1), (positions % size).reshape(-1))


def _write(cache: Array, new: Array, places: _Places, last: bool = False) -> Array:
    """The cache with new keys or values [R, T, K, H] at their places; last: positions are its last dimension."""
    new = new.reshape(-1, *new.shape[2:]).astype(cache.dtype)
    layer = () if places.layer is None else (places.layer,)
    offset = (slice(None), slice(None), places.offset) if last else (slice(None), places.offset)
    return cache.at[(*layer, places.block, *offset)].set(new, mode="drop")


# --- Single new tokens.


def _attend_in_place(q: Array, keys: Array, values: Array, view: View, rules: Rules) -> Array:
    """Queries [R, 1, N, H] -> [R, 1, N, W]: each block of the pool with the query of its row."""
    R, _, N, H = q.shape
    K, W = keys.shape[1], values.shape[-1]
    M = view.tables.shape[1]
    owners = view.owners
    assert owners is not None
    query = q.reshape(R, K, N // K, H)
    attend = functools.partial(_attend_to_blocks, query, view.positions[:, 0], rules)

    def add(parts: _Partial, row: Array, number: Array, k: Array, v: Array) -> _Partial:
        """Puts the results of blocks at (row, number)."""
        found = attend(row, number, k, v)
        return jax.tree.map(lambda x, new: x.at[row, number].set(new, mode="drop"), parts, found)

    shape = (R, M, K, N // K)
    nothing = _Partial(
        jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, W), jnp.float32)
    )
    parts = add(nothing, owners.row, owners.number, keys, values)

    def add_shared(i: Array, parts: _Partial) -> _Partial:
        row, block, number = (
            jax.lax.dynamic_slice_in_dim(x, i * PAIRS, PAIRS)
            for x in (owners.shared_row, owners.shared_block, owners.shared_number)
        )
        return add(parts, row, number, _gather(keys, block), _gather(values, block))

    if owners.shared_row.size:
        # Pairs are filled from the first on.
        used = (owners.shared_row < R).sum()
        parts = jax.lax.fori_loop(0, -(-used // PAIRS), add_shared, parts)

    # Softmax over all blocks of a row.
    weight = jnp.exp(parts.highest - parts.highest.max(1, keepdims=True))
    total = (weight * parts.total).sum(1)
    mixed = (weight[..., None] * parts.mixed).sum(1)
    # Rows without a token see nothing.
    out = mixed / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(R, 1, N, W).astype(q.dtype)


def _attend_to_blocks(
    query: Array, positions: Array, rules: Rules, row: Array, number: Array, k: Array, v: Array
) -> _Partial:
    """Queries [R, K, G, H] of some rows to one block each, k [n, K, H, S] and v [n, K, S, W]: partials [n, K, G]."""
    chosen = jnp.minimum(row, query.shape[0] - 1)
    scores = _by_vector(query[chosen], k)
    seen = _seen(positions[chosen][:, None], number, k.shape[-1], rules)
    part, weights = _exponentials(scores, seen, rules)
    return part._replace(mixed=_by_vector(weights.astype(v.dtype), v))


def _by_vector(a: Array, b: Array) -> Array:
    """Few vectors a [n, K, G, X] times matrices b [n, K, X, Y]: float32[n, K, G, Y]."""
    if platform() != "cpu":
        return _product("nkgx,nkxy->nkgy", a, b)
    G = a.shape[2]
    # On CPUs XLA's products with few rows are slower than sums of scaled vectors in float32, and in bfloat16 there is
    # none with a single row.
    if a.dtype == jnp.float32:
        return (a[..., None] * b[:, :, None]).sum(-2)
    if G == 1:
        a = jnp.concatenate([a, a], axis=2)
    return _product("nkgx,nkxy->nkgy", a, b)[:, :, :G]


# --- Several new tokens of each row.


def _attend_by_table(q: Array, keys: Array, values: Array, view: View, rules: Rules) -> Array:
    """Queries [R, T, N, H] -> [R, T, N, W]: the blocks of each row in turn, with a running softmax."""
    R, T, N, H = q.shape
    K, S, W = values.shape[1:]
    G = N // K
    # The queries that share a key head next to each other: [R, K, G * T, H].
    query = q.reshape(R, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(R, K, G * T, H)
    # int32[R, G * T]
    positions = jnp.broadcast_to(view.positions[:, None], (R, G, T)).reshape(R, G * T)

    def add(number: Array, parts: _Partial) -> _Partial:
        """The parts with the block at this place of every row's table."""
        block = jax.lax.dynamic_index_in_dim(view.tables, number, axis=1, keepdims=False)
        # Beyond the end of a row its table may hold anything; what is there is masked.
        k, v = _gather(keys, block), _gather(values, block)
        scores = _product("rkqh,rkhs->rkqs", query, k)
        seen = _seen(positions, jnp.full(R, number), S, rules)
        new, weights = _exponentials(scores, seen, rules)
        new = new._replace(mixed=_product("rkqs,rksw->rkqw", weights.astype(v.dtype), v))
        return _join(parts, new)

    shape = (R, K, G * T)
    empty = _Partial(
        jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, W), jnp.float32)
    )
    parts = jax.lax.fori_loop(0, view.positions.max() // S + 1, add, empty)
    out = parts.mixed / jnp.maximum(parts.total, 1e-30)[..., None]
    out = out.reshape(R, K, G, T, W).transpose(0, 3, 1, 2, 4)
    return out.reshape(R, T, N, W).astype(q.dtype)


def _join(a: _Partial, b: _Partial) -> _Partial:
    """Two parts of the same queries as one."""
    highest = jnp.maximum(a.highest, b.highest)
    of_a, of_b = jnp.exp(a.highest - highest), jnp.exp(b.highest - highest)
    return _Partial(
        highest,
        of_a * a.total + of_b * b.total,
        of_a[..., None] * a.mixed + of_b[..., None] * b.mixed,
    )


# --- What both need.


def _product(dims: str, a: Array, b: Array) -> Array:
    return jnp.einsum(dims, a, b, preferred_element_type=jnp.float32)


def _seen(positions: Array, number: Array, size: int, rules: Rules) -> Array:
    """bool[n, q, S]: whether queries at positions [n, q] see the positions of the block at `number` [n] in their row."""
    keys = (number[:, None] * size + jnp.arange(size)[None])[:, None]
    distance = positions[..., None] - keys
    near = distance >= 0
    if rules.window and rules.use_window is not False:
        limit = jnp.where(rules.use_window, rules.window, jnp.iinfo(jnp.int32).max)
        near = near & (distance < limit)
    return near


def _exponentials(scores: Array, seen: Array, rules: Rules) -> tuple[_Partial, Array]:
    """(highest score and total, mixed yet to come; exp(scores - highest)), of scores float32[n, K, q, S]."""
    scores = scores * rules.scale
    if rules.softcap:
        scores = rules.softcap * jnp.tanh(scores / rules.softcap)
    scores = jnp.where(seen[:, None], scores, _MASKED)
    highest = scores.max(-1)
    # Where nothing is seen all are 1, and count for nothing next to a block of which something is.
    weights = jnp.exp(scores - highest[..., None])
    return _Partial(highest, weights.sum(-1), jnp.zeros(())), weights


def _gather(pool: Array, blocks: Array) -> Array:
    """The blocks int32[n] of a pool: [n, ...]."""
    return pool.at[blocks].get(mode="clip")


def copy_blocks(cache: LayerBlocks, source: Array, target: Array) -> LayerBlocks:
    """The blocks of a device, in which the blocks `target` int32[R] are copies of `source` int32[R]; -1: none."""

    def copy(x: Array) -> Array:
        # A negative index would count from the end; one beyond it is dropped.
        to = jnp.where(source < 0, x.shape[-4], target)
        return x.at[..., to, :, :, :].set(x[..., jnp.maximum(source, 0), :, :, :], mode="drop")

    return jax.tree.map(copy, cache)


def resize(cache: LayerBlocks, count: int) -> LayerBlocks:
    """The cache of a device with `count` blocks: with further ones at the end, or without the last ones."""

    def resize_one(x: Array) -> Array:
        old = x.shape[-4]
        if count <= old:
            return x[..., :count, :, :, :]
        widths = [(0, 0)] * x.ndim
        widths[-4] = (0, count - old)
        return jnp.pad(x, widths)

    return jax.tree.map(resize_one, cache)
