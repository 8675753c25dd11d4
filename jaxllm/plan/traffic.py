"""Bytes that a compiled program reads from and writes to its device's memory, from the text of its HLO module.

XLA fuses operations; a fusion reads its operands once and writes its result once, and what happens inside it stays on
the chip. So the bytes are those of operands and results, of all operations that run and as often as they run, except
that

    a dynamic slice or a gather reads the slices, not the array they are cut from, wherever they go;
    a dynamic update or a scatter writes the updates into an array that is there already;
    an array that the compiler has placed on the chip or in the host's memory, S(1) or S(5), costs nothing.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxllm.plan.hlo import Module, bytes_of_shapes, parts_of, result_shape

# Operations that name data and move none, or whose bytes are counted where they are started or inside what they call.
_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_INSTRUCTION = re.compile(r"^ *(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
# An array in a memory other than the device's main one.
_ELSEWHERE = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}")


class Instruction(NamedTuple):
    name: str
    shape: str
    kind: str  # the operation
    operands: Sequence[str]  # names
    line: str
    is_root: bool


def bytes_moved(module: Module, unknown_trips: int = 1) -> int:
    """Bytes that one run of a program moves between a device and its memory.

    Args:
      module: the compiled program.
      unknown_trips: how often an outermost loop runs whose end depends on data.
    """
    once: dict[str, int] = {}
    total = 0
    for computation, times in module.runs(unknown_trips):
        if computation not in once:
            once[computation] = _bytes_of_computation(module, computation)
        total += once[computation] * times
    return total


def _bytes_of_computation(module: Module, name: str) -> int:
    instructions = _instructions(module, name)
    return sum(_bytes_of(module, each, instructions) for each in instructions.values())


def _instructions(module: Module, name: str) -> dict[str, Instruction]:
    found = {}
    for line in module.bodies[name]:
        if parsed := _INSTRUCTION.match(line):
            root, own_name, shape, kind, rest = parsed.groups()
            # Operands end before the attributes, some of which name computations.
            operands = _OPERAND.findall(rest.partition(")")[0])
            found[own_name] = Instruction(own_name, shape, kind, operands, line, bool(root))
    return found


def _bytes_of(module: Module, each: Instruction, others: dict[str, Instruction]) -> int:
    """What one instruction reads and writes."""
    if each.kind in _FREE or each.kind.endswith("-done"):
        return 0
    shapes = [others[name].shape for name in each.operands if name in others]
    written = result_shape(each.kind, each.shape)
    if each.kind in ("fusion", "fusion-start") and (called := _CALLS.search(each.line)):
        return _bytes_of_fusion(module, called[1], written, shapes)
    if each.kind in ("dynamic-slice", "gather"):
        return _size_of_slice(written, shapes[0]) + _size(written)
    if each.kind == "dynamic-update-slice":
        return 2 * _size(shapes[1])
    if each.kind == "scatter":
        return _size(shapes[1]) + 2 * _size(shapes[2])
    return _size(written) + sum(map(_size, shapes))


def _bytes_of_fusion(module: Module, name: str, written: str, shapes: Sequence[str]) -> int:
    inside = _instructions(module, name)
    read = sum(_bytes_read(module, inside, number, shape) for number, shape in enumerate(shapes))
    (root,) = (each for each in inside.values() if each.is_root)
    results = root.operands if root.kind == "tuple" else [root.name]
    return read + sum(
        _bytes_written(_without_bitcasts(inside[result], inside), shape, inside)
        for result, shape in zip(results, parts_of(written), strict=False)
    )


def _bytes_read(module: Module, inside: dict[str, Instruction], number: int, shape: str) -> int:
    """What a fusion reads of one of its operands, whose shape is given."""
    whole = _size(shape)
    if not whole:
        return 0
    (parameter,) = (each for each in inside.values() if f" parameter({number})" in each.line)
    total = 0
    for user, place in _users(parameter, inside):
        if user.kind == "dynamic-slice":
            total += _size_of_slice(user.shape, shape)
        elif user.kind in ("dynamic-update-slice", "scatter") and place == 0:
            continue  # written in place
        elif user.kind == "fusion" and (called := _CALLS.search(user.line)):
            total += _bytes_read(module, _instructions(module, called[1]), place, shape)
        else:
            return whole
    return min(total, whole)


def _users(source: Instruction, inside: dict[str, Instruction]) -> list[tuple[Instruction, int]]:
    """The instructions that use a value, looking through bitcasts, and as which of their operands."""
    users = []
    for each in inside.values():
        if source.name not in each.operands:
            continue
        if each.kind == "bitcast":
            users += _users(each, inside)
        else:
            users.append((each, list(each.operands).index(source.name)))
    return users


def _without_bitcasts(each: Instruction, inside: dict[str, Instruction]) -> Instruction:
    while each.kind == "bitcast" and each.operands[0] in inside:
        each = inside[each.operands[0]]
    return each


def _bytes_written(result: Instruction, shape: str, inside: dict[str, Instruction]) -> int:
    """What a fusion writes of a result."""
    if result.kind in ("dynamic-update-slice", "scatter"):
        # Of a scatter the last operand is the updates, the one before it where they go.
        update = inside[result.operands[1 if result.kind == "dynamic-update-slice" else 2]]
        return min(_size(update.shape), _size(shape))
    return _size(shape)


def _size_of_slice(part: str, whole: str) -> int:
    """Bytes read of an array for a part of it, which may itself be on the chip."""
    return min(bytes_of_shapes(part), _size(whole))


def _size(shape: str) -> int:
    """Bytes of a shape in the device's main memory."""
    return bytes_of_shapes(_ELSEWHERE.sub("", shape))
