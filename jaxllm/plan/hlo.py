"""A compiled program, read from the text of its HLO module: what runs how often, and what it sends."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BYTES = {
    "f64": 8,
    "s64": 8,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
}

_LOOP = re.compile(r"while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
# Written by XLA where it has found out how often a loop runs.
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The sparse cores of TPU7x run collectives next to the rest of the program, as computations that are called.
_CALL = re.compile(r" (?:call|call-start|custom-call-start|conditional|async-start)\(.*")
_CALLED = re.compile(r"(?:to_apply|calls|computation|called_computations)=\{?%?([\w.\-]+)")
# Between slices the runtime of the hosts moves what a slice has reduced already.
_BETWEEN_SLICES = re.compile(r' = \((\S+), .* send\(.*_xla_megascale_transfer_type="(\w+)"')
_COLLECTIVE = re.compile(rf" ({'|'.join(_KINDS)})(?:-start)?\(")


class Collectives:
    """Counts and bytes by (kind, mesh axes), while a module is walked."""

    def __init__(self, mesh: Any, slow_axis: str):
        self._mesh = mesh
        self._slow_axis = slow_axis
        self._counts: dict[tuple[str, tuple[str, ...]], int] = {}
        self._bytes: dict[tuple[str, tuple[str, ...]], float] = {}

    def see(self, line: str, times: int) -> None:
        """Note the collective that a line of HLO may hold, which runs so many times."""
        if far := _BETWEEN_SLICES.search(line):
            kind = far[2].lower().replace("_", "-")
            self._add(kind, (self._slow_axis,), times, times * bytes_of_shapes(far[1]))
        elif near := _COLLECTIVE.search(line):
            axes = axes_of(line, self._mesh)
            devices = self._mesh.size
            if axes:
                devices = math.prod(self._mesh.shape[axis] for axis in axes)
            sent = _sent_bytes(near[1], _result_bytes(line, near), devices)
            self._add(near[1], axes, times, times * sent)

    def _add(self, kind: str, axes: tuple[str, ...], count: int, size: float) -> None:
        key = (kind, axes)
        self._counts[key] = self._counts.get(key, 0) + count
        self._bytes[key] = self._bytes.get(key, 0.0) + size

    def as_list(self) -> list[dict[str, Any]]:
        rows = []
        for kind, axes in sorted(self._counts):
            count, size = self._counts[kind, axes], self._bytes[kind, axes]
            rows.append({"kind": kind, "axes": list(axes), "count": int(count), "bytes": int(size)})
        return rows


class Module:
    """A compiled program, from the text of its HLO module.

    Attributes:
      bodies: {name of a computation: its lines}.
      entry: the computation that the program begins with.
    """

    def __init__(self, text: str):
        self.bodies: dict[str, list[str]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            # A computation begins with its name and an opening brace.
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(|\{).*\{$", line):
                name = head[2]
                self.bodies[name] = []
                if head[1]:
                    self.entry = name
            elif name:
                self.bodies[name].append(line)

    def runs(self, unknown_trips: int = 1) -> Iterator[tuple[str, int]]:
        """Pairs of (computation, how often it runs) of all that run by themselves, not inside a fusion.

        Args:
          unknown_trips: how often an outermost loop runs whose end depends on data.
        """
        waiting = [(self.entry, 1, unknown_trips)]
        while waiting:
            name, times, unknown = waiting.pop()
            yield name, times
            for line in self.bodies.get(name, ()):
                # The body runs as often as the loop around it and its own trips together.
                if loop := _LOOP.search(line):
                    trips = _trip_count(line, self.bodies.get(loop[1], ()))
                    waiting.append((loop[2], times * (trips or unknown), unknown if trips else 1))
                elif call := _CALL.search(line):
                    waiting += [(called, times, unknown) for called in _CALLED.findall(call[0])]


def collectives(
    module: Module, mesh: Any, unknown_trips: int = 1, slow: str = "data"
) -> list[dict[str, Any]]:
    """What a compiled program sends: [{kind, axes, count, bytes that leave a device in all}].

    Args:
      module: the compiled program.
      mesh: its mesh, to name the axes that a collective runs along.
      unknown_trips: as in `Module.runs`.
      slow: the mesh axis that runs over slices.
    """
    found = Collectives(mesh, slow)
    for name, times in module.runs(unknown_trips):
        for line in module.bodies.get(name, ()):
            # A call can be a collective as well: it starts one and runs its reduction.
            found.see(line, times)
    return found.as_list()


def _trip_count(loop: str, condition: Iterable[str]) -> int:
    """How often a loop runs: the constant its counter is compared with; 0 if something else may end it too."""
    if known := _TRIPS.search(loop):
        return int(known[1])
    limits = [0]
    for line in condition:
        if " and(" in line:
            return 0
        limits += map(int, re.findall(r"s32\[\][^=]*constant\((\d+)\)", line))
    return max(limits)


def _sent_bytes(kind: str, result: int, devices: int) -> float:
    """Bytes that leave a device in a ring, from the bytes of the result (Patarasuk and Yuan 2009)."""
    others = (devices - 1) / devices
    if kind == "collective-permute":
        return float(result)
    if kind == "all-reduce":  # a reduce-scatter and an all-gather
        return result * 2 * others
    if kind == "reduce-scatter":  # its result is a shard of what it reduces
        return result * devices * others
    return result * others


def _result_bytes(line: str, operation: re.Match[str]) -> int:
    """Bytes of what the collective on this line of HLO returns."""
    # Between " = " and the operation's name is the type of its result.
    shape = line[: operation.start()].split(" = ", 1)[1]
    return bytes_of_shapes(result_shape(operation[0].strip(" ("), shape))


def result_shape(kind: str, shape: str) -> str:
    """The shape of an operation's result, which of one that is only started is a part of what it returns.

    kind: as in HLO, "all-gather-start".
    """
    parts = parts_of(shape)
    if not kind.endswith("-start") or len(parts) == 1:
        return shape
    # A TPU's all-reduce returns its results only.
    if kind == "all-reduce-start" and not parts[0].startswith("("):
        return shape
    # (operands, results, ...); of a copy, (result, operand, ...).
    return parts[0] if kind == "copy-start" else parts[1]


def parts_of(shape: str) -> list[str]:
    """The parts of a tuple's shape, "((f32[2]), f32[2])" -> "(f32[2])", "f32[2]"; of another shape, itself."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, begin = [], 0, 1
    for index, char in enumerate(shape):
        if char in "({[":
            depth += 1
        elif char in ")}]":
            depth -= 1
        # A comma between parts, or the end of the tuple.
        if (char == "," and depth == 1) or (char == ")" and depth == 0):
            parts.append(shape[begin:index].strip())
            begin = index + 1
    return parts


def bytes_of_shapes(shapes: str) -> int:
    """Bytes of all shapes in a text such as "(bf16[2,3]{1,0}, f32[4])"."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        sizes = [int(size) for size in dims.split(",") if size]
        # Types that are not in the table hold no data worth counting; 4 errs on the safe side.
        total += _BYTES.get(dtype, 4) * math.prod(sizes)
    return total


# --- Which mesh axes a collective runs along.


def axes_of(line: str, mesh: Any) -> tuple[str, ...]:
    """The mesh axes along which a collective's groups of devices lie, from its replica groups.

    On a mesh of data 2 x fsdp 2, devices are numbered 0 1 / 2 3: groups {0,1},{2,3} run along fsdp, {0,2},{1,3} along
    data.
    """
    by_name = _named_axes(line, mesh)
    if by_name is not None:
        return by_name
    if group := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        members = [int(device) for device in group[1].split(",")]
    elif iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        members = _first_group(*iota.groups(default=""))
    else:
        # Without groups all devices take part.
        return tuple(_wide_axes(mesh.shape))
    coordinates = np.unravel_index(members, tuple(mesh.shape.values()))
    along = []
    for axis, values in zip(mesh.shape, coordinates, strict=True):
        if len(set(values.tolist())) > 1:
            along.append(axis)
    return tuple(along)


def _wide_axes(shape: Mapping[str, int]) -> list[str]:
    return [axis for axis, size in shape.items() if size > 1]


def _named_axes(line: str, mesh: Any) -> tuple[str, ...] | None:
    """Axes of groups that name them, as in replica_groups=mesh['x'=2,'y'=4] {'y'}; None if this line does not.

    XLA may have renamed the axes of the mesh, but not reordered them.
    """
    groups = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    wide = _wide_axes(mesh.shape)
    if not groups:
        return None
    theirs: list[str] = []
    for part in groups[1].split(","):
        name, size = part.split("=")
        if int(size) > 1:
            theirs.append(name.strip("' "))
    if len(theirs) != len(wide):
        return None
    named = [name.strip("' ") for name in groups[2].split(",")]
    return tuple(wide[theirs.index(name)] for name in named if name in theirs)


def _first_group(size: str, dims: str, order: str) -> Sequence[int]:
    """Devices of the first group in HLO's iota notation, [groups, size]<=[dims]T(order)."""
    shape = [int(dim) for dim in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    # The transposition puts the devices of a group next to one another.
    if order:
        ids = ids.transpose([int(axis) for axis in order.split(",")])
    return ids.reshape(-1, int(size))[0].tolist()
