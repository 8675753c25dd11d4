"""A stage that goes on with another number of devices: the same batches, in as many microbatches as memory asks for.

The sums of microbatches are divided once, by the weight of all, so that their number changes a result by rounding only
(`train.accumulate`). It may therefore follow the devices. A stage notes how many rows a device had at a time when it
began, which is what fitted; with fewer devices it takes more microbatches, so that a device never has more:

    batch of 16 rows, num_micro 1      8 devices: 2 rows each      4 devices: 2 microbatches of 2 rows each
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from jaxllm.config import InputError
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.console import console
from jaxllm.runtime.files import read_json, write_json
from jaxllm.runtime.mesh import planned_mesh
from jaxllm.sharding import batch_shards

# In the stage's directory: what fitted.
_RECORD = "rows.json"


def fit(config: Any, stage: str, mesh: jax.sharding.Mesh, directory: epath.Path) -> Any:
    """The config of a stage's section for the devices that are there: `num_micro` may be another one.

    All processes call this together, after `Workspace.begin`.

    Args:
        config: the whole config.
        stage: the stage's name.
        mesh: the stage's mesh.
        directory: the stage's directory, in which what fitted is noted.

    Raises:
        InputError: no number of microbatches lets these devices share a batch; it says how many devices could.
    """
    section = getattr(config, stage)
    if not hasattr(section, "num_micro"):
        return config
    sizes = batch_sizes(section)
    shards = batch_shards(mesh)
    fewest = getattr(section, "smallest_microbatch", 1)
    counts = [n for n in possible_counts(sizes, shards) if min(sizes) // n >= fewest]
    if not counts:
        raise InputError(_no_layout(config.mesh_of(stage), stage, sizes, shards, mesh.size))
    record = read_json(directory / _RECORD)
    if record is None:
        _note(directory, section.num_micro, sizes[0], shards, mesh.size)
        return config
    num_micro = _choose(counts, section.num_micro, sizes[0] // shards, record["rows_per_device"])
    if num_micro == section.num_micro:
        return config
    console.print(
        f"{stage}: began on {record['devices']} devices, now there are {mesh.size}: num_micro {section.num_micro} -> "
        f"{num_micro}, so that a device has at most {record['rows_per_device']} rows at a time, as before",
        soft_wrap=True,
    )
    return dataclasses.replace(config, **{stage: dataclasses.replace(section, num_micro=num_micro)})


def batch_sizes(section: Any) -> list[int]:
    """Rows of each batch of a stage that is cut into `num_micro` microbatches."""
    if not hasattr(section, "minibatch_size"):
        return [section.batch_size]
    sizes = [section.minibatch_size]
    # PPO learns next tokens from further rows beside.
    return [*sizes, section.ptx.batch_size] if section.ptx.coef else sizes


def possible_counts(sizes: list[int], shards: int) -> Iterator[int]:
    """Numbers of microbatches, the lowest first, such that every microbatch has as many rows on each device."""
    for count in range(1, min(sizes) + 1):
        if all(size % (count * shards) == 0 for size in sizes):
            yield count


def _choose(counts: list[int], configured: int, rows: int, most: int) -> int:
    """The number of microbatches that the config asks for, or else the lowest that keeps to `most` rows.

    rows: of a device in a whole batch.
    """
    fitting = [count for count in counts if rows // count <= most]
    # The highest possible count leaves a device with what it takes at least.
    return configured if configured in fitting else min(fitting, default=counts[-1])


def _note(directory: epath.Path, num_micro: int, size: int, shards: int, devices: int) -> None:
    """Note what fits, on process 0; of a config that does not fit these devices the stage itself says so."""
    if jax.process_index() == 0 and size % (num_micro * shards) == 0:
        record = {"rows_per_device": size // num_micro // shards, "devices": devices}
        write_json(directory / _RECORD, record)


def _no_layout(mesh: MeshConfig, stage: str, sizes: list[int], shards: int, devices: int) -> str:
    could = []
    for count in range(1, 2 * devices + 1):
        try:
            then = batch_shards(planned_mesh(mesh, count))
        except InputError:
            continue
        if [*possible_counts(sizes, then)]:
            could.append(str(count))
    rows = " or ".join(f"{size:,}" for size in sizes)
    return (
        f"{stage}.batch_size, of an update: {rows} does not divide over the {shards} shards of {devices} devices, "
        f"in any number of microbatches; {', '.join(could) or 'no number of'} devices could (up to {2 * devices})"
    )
