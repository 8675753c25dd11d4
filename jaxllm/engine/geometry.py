"""How large the arrays of an engine are."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.config import InputError
from jaxllm.engine import inputs
from jaxllm.engine.config import EngineConfig
from jaxllm.engine.programs import Chunks, Rows
from jaxllm.engine.row_sampling import History, RowRules
from jaxllm.models import decode, transformer
from jaxllm.models.block_cache import Owners, cache_axes
from jaxllm.models.config import ModelConfig
from jaxllm.sharding import activation, batch_shards, rows_like, with_shardings

# The pool has an eighth of its blocks, two eighths, and so on: the least that holds those in use. A decoding step reads
# all of it, so fewer sizes are slower (halves: 9% in bfloat16 on a CPU), and more of them are more programs to compile.
_POOL_SIZES = 8
# Programs are compiled for all slots, a quarter of them, and so on, but for no fewer rows than this.
_FEWEST_ROWS = 2


class Level(NamedTuple):
    """Sizes that go together, of one shard, where programs are few: for a light load, a medium one, and a full one."""

    rows: int
    chunks: int  # blocks of prompts that are prefilled in one call
    blocks: int  # of the pool


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of an engine on a mesh; rows and blocks are those of one shard of a batch."""

    config: ModelConfig  # from `decode.decoding_config`
    mesh: Any
    settings: EngineConfig
    width: int  # most blocks of a row
    num_blocks: int  # most blocks of the pool
    few: bool = False  # whether programs are compiled for few sizes that go together

    @property
    def num_shards(self) -> int:
        return batch_shards(self.mesh)

    @property
    def longest(self) -> int:
        """Most tokens of a prompt with its response."""
        return min(self.config.max_length, self.width * self.settings.block)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Numbers of rows that programs are compiled for, in ascending order: 64 -> 4, 16, 64."""
        return _quarters(max(self.settings.slots, _FEWEST_ROWS), _FEWEST_ROWS)

    @functools.cached_property
    def chunk_sizes(self) -> list[int]:
        """Numbers of blocks that are prefilled in one call, in ascending order: 16 -> 1, 4, 16."""
        return _quarters(self.settings.prefill_blocks, 1)

    def level_for(self, needed: Level) -> Level:
        """The least sizes that programs are compiled for and that hold what is needed."""
        if self.few:
            return next(level for level in self.levels if all(map(operator.ge, level, needed)))
        return Level(
            _least(self.sizes, needed.rows),
            _least(self.chunk_sizes, needed.chunks),
            self.pool_for(needed.blocks),
        )

    @functools.cached_property
    def levels(self) -> list[Level]:
        """The sizes of few programs, in ascending order, with 64 slots: (4, 1, 1/8 of the blocks), (16, 4, 1/2), (64, 16, all)."""
        pools = (max(self.num_blocks // share, 1) for share in (8, 2, 1))
        rows, chunks = _last_three(self.sizes), _last_three(self.chunk_sizes)
        return sorted(set(map(Level, rows, chunks, pools)))

    @functools.cached_property
    def widths(self) -> list[int]:
        """All that `width_for` returns, in ascending order."""
        widths = [self.width_for(0)]
        while widths[-1] < self.width:
            widths.append(self.width_for(widths[-1] + 1))
        return widths

    def width_for(self, num_blocks: int) -> int:
        """Blocks of a table that a program is compiled for."""
        return inputs.room_for(num_blocks, self.width)

    def pool_for(self, num_blocks: int) -> int:
        """Blocks of the pool that programs are compiled for: they read all of it."""
        part = -(-self.num_blocks // _POOL_SIZES)
        return min(max(-(-num_blocks // part), 1) * part, self.num_blocks)

    def empty_cache(self, num_blocks: int) -> decode.BlockCache:
        """The cache without tokens, on the devices of the mesh; num_blocks: of the pool of a shard."""
        return _empty_cache(self.config, num_blocks * self.num_shards, self.settings.block)

    # --- What programs take, as shapes.

    def cache_shapes(self) -> Any:
        """The cache, with its shardings."""
        shapes = jax.eval_shape(lambda: self.empty_cache(self.num_blocks))
        shardings = jax.tree.map(lambda leaf: activation(self.mesh, *cache_axes(leaf)), shapes)
        return with_shardings(shapes, shardings)

    def rows_shapes(self, num_rows: int, width: int) -> Rows:
        """`num_rows` rows of each shard."""
        count = num_rows * self.num_shards
        number, real = _shape((count,)), _shape((count,), jnp.float32)
        rules = RowRules(real, number, *[real] * 5)
        no_history = History(_shape((count, 0)), number)
        rows = Rows(
            token=number,
            position=number,
            number=number,
            remaining=number,
            keys=_shape((count, 2), jnp.uint32),
            stops=_shape((count, inputs.room_for(1))),
            rules=rules,
            history=no_history,
            tables=_shape((count, width)),
        )
        return rows_like(self.mesh, rows)

    def owners_shapes(self) -> Owners:
        """The owners of all blocks, none of which is shared."""
        blocks, nothing = _shape((self.num_blocks * self.num_shards,)), _shape((0,))
        return rows_like(self.mesh, Owners(blocks, blocks, nothing, nothing, nothing))

    def chunks_shapes(self, num_rows: int, width: int) -> Chunks:
        """What is prefilled in one call."""
        count = self.settings.prefill_blocks * self.num_shards
        tokens = _shape((count, self.settings.block))
        row = _shape((num_rows * self.num_shards,))
        chunks = Chunks(tokens, tokens, _shape((count, width)), row)
        return rows_like(self.mesh, chunks)


def weights_shapes(config: ModelConfig, mesh: Any) -> Any:
    """Parameters as `decode.unstack` returns them, with their shardings; config: from `decode.decoding_config`."""
    with jax.set_mesh(mesh):
        unstack = functools.partial(decode.unstack, config=config)
        shapes = jax.eval_shape(unstack, transformer.abstract(config))
        return with_shardings(shapes, decode.unstacked_shardings(mesh, shapes, config))


@functools.lru_cache(maxsize=16)
def unstacking(config: ModelConfig, mesh: Any) -> Callable[[Any], Any]:
    """`decode.unstack`, compiled for a mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, weights_shapes(config, mesh))
    return jax.jit(functools.partial(decode.unstack, config=config), out_shardings=shardings)


def _quarters(most: int, least: int) -> list[int]:
    """`most`, a quarter of it and so on, in ascending order."""
    sizes = [most]
    while sizes[0] // 4 >= least:
        sizes.insert(0, sizes[0] // 4)
    return sizes


def _least(sizes: Sequence[int], count: int) -> int:
    """The first of these sizes, in ascending order, that holds `count`."""
    return next(size for size in sizes if size >= count)


def _last_three(sizes: list[int]) -> list[int]:
    """The three largest of ascending sizes; the smallest is repeated if there are fewer."""
    return [*[sizes[0]] * (3 - len(sizes)), *sizes[-3:]]


def _shape(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_cache(config: ModelConfig, count: int, size: int) -> Any:
    return decode.empty_blocks(config, count, size)


def geometry_for(
    config: ModelConfig, mesh: Any, settings: EngineConfig, longest: int = 0, few: bool = False
) -> Geometry:
    """Sizes for rows of up to `longest` tokens; 0: the model's context. few: as in `Geometry`.

    Raises:
      InputError: the memory for the cache does not hold one row of this length on each shard.
    """
    with jax.set_mesh(mesh):
        config = decode.decoding_config(config)
    width = -(-(longest or config.max_length) // settings.block)
    blocks = settings.slots * width
    if settings.cache_gib:
        size = decode.block_bytes(config, settings.block) * batch_shards(mesh)
        blocks = min(blocks, int(settings.cache_gib * 2**30) // size)
        if blocks < width:
            raise InputError(
                f"cache_gib: {settings.cache_gib:g} does not hold one response at full length on each shard "
                f"of the batch, which takes {width * size / 2**30:.3g} GiB; raise it"
            )
    return Geometry(config, mesh, settings, width, blocks, few)
