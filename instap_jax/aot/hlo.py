"""Reading the text of a compiled TPU program: loops, cycles, collectives.

Only what reports need. The text is that of `compiled.as_text()`: computations of instructions, one
a line, every `while` with a body that runs a number of times found in its condition.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Opcodes that run other computations once.
_CALLS = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:true_computation|false_computation)=%?([\w.\-]+)")
_BRANCH_LIST = re.compile(r"branch_computations=\{([^}]*)\}")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")  # a SparseCore's computations name it
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_ARRAY = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")  # with its layout
_HOST = "S(5)"  # in a layout: the host's memory
# Opcodes that may move between memories: which operand they move, and which array of the shape of
# their "-start" is its target: (operands, result, context), of a copy (target, source, context).
_MOVES = {"dynamic-update-slice": (1, 0), "dynamic-slice": (0, -2), "copy": (0, 0)}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line. `rest` is what follows the opening parenthesis of its operands."""

    name: str
    shape: str
    opcode: str
    rest: str

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visit:
    """An instruction as the program runs it.

    Attributes:
      times: how often in one step.
      computation: the one that runs it; of a fused instruction, the one that runs the fusion.
      fused: it is a part of a fusion, whose cost the fusion carries.
    """

    instruction: Instruction
    times: int
    computation: str
    fused: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Traffic of one collective instruction in one step.

    Attributes:
      kind: of `COLLECTIVES`.
      axes: mesh axes that it goes over, as 'replica+fsdp'; '?' where that cannot be read.
      network: 'ICI' within a slice, 'DCN' between slices.
      bytes: that a chip receives, all runs together.
      times: how often it runs.
    """

    kind: str
    axes: str
    network: str
    bytes: float
    times: int


def parse(text: str) -> Module:
    """Raises ValueError for a text without an entry computation."""
    computations, entry, name = {}, None, None
    lines: dict[str, Instruction] = {}
    root, last = "", None
    for line in text.splitlines():
        if name is None:
            header = _COMPUTATION.match(line)
            if header:
                name, lines, root, last = header[2], {}, "", None
                entry = name if header[1] else entry
        elif _END.match(line):
            computations[name] = Computation(name=name, instructions=lines, root=root)
            name = None
        elif found := _INSTRUCTION.match(line):
            is_root, last, shape, opcode, rest = found.groups()
            lines[last] = Instruction(name=last, shape=shape, opcode=opcode, rest=rest)
            root = last if is_root else root
        elif last:  # attributes of a kernel go on over several lines, which may start with '}'
            before = lines[last]
            lines[last] = dataclasses.replace(before, rest=f"{before.rest}\n{line}")
    if entry is None:
        raise ValueError("no entry computation in the text of the compiled program")
    return Module(computations=computations, entry=entry)


def walk(module: Module) -> Iterator[Visit]:
    """Every instruction that runs, with how often; loops multiply, branches all count.

    A loop whose count cannot be read counts once (`trip_count`).
    """
    yield from _walk(module, module.entry, 1, module.entry, False)


def _walk(module: Module, name: str, times: int, runs: str, fused: bool) -> Iterator[Visit]:
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        yield Visit(instruction=instruction, times=times, computation=runs, fused=fused)
        opcode, rest = instruction.opcode, instruction.rest
        if opcode == "while":
            count = times * (trip_count(module, computation, instruction) or 1)
            for part in ("body", "condition"):
                inner = instruction.attribute(part)
                yield from _walk(module, inner, count, inner, fused)
        elif opcode == "fusion":
            inner = _CALLS.search(rest)[1]
            yield from _walk(module, inner, times, runs, True)
        elif opcode in ("call", "async-start"):
            inner = _CALLS.search(rest)[1]
            yield from _walk(module, inner, times, inner, fused)
        elif opcode == "conditional":
            listed = _BRANCH_LIST.search(rest)
            found = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else _BRANCHES.findall(rest)
            for inner in found:
                yield from _walk(module, inner, times, inner, fused)


def trip_count(module: Module, outer: Computation, loop: Instruction) -> int | None:
    """How often a counted loop runs, from its condition, its start and its step; None: unknown."""
    condition = module.computations[loop.attribute("condition")]
    body = module.computations[loop.attribute("body")]
    start = outer.instructions.get(loop.operands[0])
    compare = condition.instructions[condition.root]
    if compare.opcode != "compare" or start is None or start.opcode != "tuple":
        return None

    def initial(index: int) -> int | None:
        value = _affine(outer, start.operands[index])
        return value[1] if value and value[0] is None else None

    def constant(computation: Computation, name: str) -> int | None:
        value = _affine(computation, name)
        if value is None or value[0] is None:
            return value and value[1]
        carried = initial(value[0])  # a constant that the loop carries along
        return None if carried is None else carried + value[1]

    counter = _affine(condition, compare.operands[0])
    bound = constant(condition, compare.operands[1])
    if counter is None or counter[0] is None or bound is None:
        return None
    index, first = counter[0], initial(counter[0])
    after = _affine(body, body.instructions[body.root].operands[index], constant)
    if first is None or after is None or after[0] != index or not after[1]:
        return None
    span, step = bound - first - counter[1], after[1]
    direction = re.search(r"direction=(\w+)", compare.rest)[1]
    if direction in ("LE", "GE"):
        span += 1 if direction == "LE" else -1
    if direction == "NE":
        return span // step if span % step == 0 else None
    return max(math.ceil(span / step), 0)


def _affine(computation: Computation, name: str, constant=None) -> tuple[int | None, int] | None:
    """A scalar as (index of the loop's carried tuple or None, offset): tuple[index] + offset."""
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        value = re.match(r"(-?\d+)\)", instruction.rest)
        return (None, int(value[1])) if value else None
    if opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        return _affine(computation, operands[0], constant)
    if opcode == "get-tuple-element":
        source = computation.instructions.get(operands[0])
        if source is None or source.opcode != "parameter":
            return None
        return int(instruction.attribute("index")), 0
    if opcode in ("add", "subtract"):
        left, right = (_affine(computation, operand, constant) for operand in operands)
        if left is None or right is None:
            return None
        if right[0] is not None and constant is not None:
            known = constant(computation, operands[1])
            right = None if known is None else (None, known)
        if right is None or right[0] is not None:
            return None
        return left[0], left[1] + (right[1] if opcode == "add" else -right[1])
    return None


def cycles(visits: list[Visit]) -> int:
    """The compiler's `estimated_cycles` of the whole program; none for collectives and kernels."""
    total = 0
    for visit in visits:
        if not visit.fused:
            found = _CYCLES.search(visit.instruction.rest)
            total += visit.times * int(found[1]) if found else 0
    return total


def hottest(visits: list[Visit], count: int) -> list[tuple[int, str]]:
    """(estimated cycles, operation of the model) of what costs most, by name in the traced step."""
    total: dict[str, int] = {}
    for visit in visits:
        found = _CYCLES.search(visit.instruction.rest)
        if found and not visit.fused:
            named = re.search(r'op_name="([^"]*)"', visit.instruction.rest)
            name = named[1].removeprefix("jit(step)/") if named else visit.instruction.opcode
            total[name] = total.get(name, 0) + visit.times * int(found[1])
    return sorted(((value, name) for name, value in total.items()), reverse=True)[:count]


def host_traffic(module: Module, visits: list[Visit]) -> dict[str, float]:
    """Bytes a step writes to the host's memory ('out') and reads from it ('in').

    Slices put into arrays there and taken out of them (what a loop offloads), and copies of whole
    arrays. In a fusion none was seen.
    """
    total = {"out": 0.0, "in": 0.0}
    for visit in visits:
        one = visit.instruction
        opcode = one.opcode.removesuffix("-start")  # of a pair that moves beside computation
        if visit.fused or opcode not in _MOVES:
            continue
        operand, member = _MOVES[opcode]
        known = module.computations[visit.computation].instructions
        source = known[one.operands[operand]].shape
        arrays = _ARRAY.findall(one.shape)
        target = arrays[member] if one.opcode != opcode else arrays[0]
        if (_HOST in target) != (_HOST in source):
            moved = source if opcode == "dynamic-update-slice" else target
            total["out" if _HOST in target else "in"] += visit.times * size(moved)
    return total


def size(shape: str) -> float:
    """Bytes of a shape, all members of a tuple together, without the padding of its layout."""
    return sum(_array_bytes(*found) for found in _SHAPE.findall(shape))


def _array_bytes(dtype: str, dims: str) -> float:
    return BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)


def collectives(
    visits: list[Visit], shape: dict[str, int], slices: int = 1, sliced: str = "replica"
) -> list[Collective]:
    """Traffic of the collectives.

    Bytes are what a ring moves: with n chips in a group and S bytes of the result, an all-gather or
    all-to-all brings a chip S (n-1)/n, a reduce-scatter S (n-1), an all-reduce 2 S (n-1)/n, a
    permutation S. Between slices, the payload P that a chip hands to the network is 2 P (n-1)/n.

    Args:
      shape: axis name -> size of the whole mesh, major first, in order of the program's devices.
      slices: number of slices, of which axis `sliced` is the product with what is within one.
    """
    inner = dict(shape) | {sliced: shape[sliced] // slices}  # a program is that of one slice
    seen, found = set(), []
    for visit in visits:
        instruction = visit.instruction
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "send" and "_xla_megascale" in instruction.rest:
            payload = size(instruction.shape.split(", u32[]")[0])
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
            name = kind[1].lower().replace("_", "-") if kind else "send"
            amount = payload * (2 * (slices - 1) / slices if name == "all-reduce" else 1)
            found.append(_collective(name, sliced, "DCN", amount, visit.times))
        elif opcode in COLLECTIVES:
            # The compiler spreads one collective over several fusions, each with a copy of it.
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = (channel[1], visit.computation, opcode) if channel and visit.fused else None
            if key is None or key not in seen:
                seen.add(key)
                members = groups(instruction.rest, inner)
                amount = _traffic(opcode, instruction, members)
                axes = _varying(members, inner)
                found.append(_collective(opcode, axes, "ICI", amount, visit.times))
    return found


def _collective(kind: str, axes: str, network: str, amount: float, times: int) -> Collective:
    return Collective(kind=kind, axes=axes, network=network, bytes=amount * times, times=times)


def _traffic(kind: str, instruction: Instruction, members: np.ndarray | None) -> float:
    """Bytes that a chip receives in one run."""
    count = members.shape[-1] if members is not None else 2
    arrays = [_array_bytes(*found) for found in _SHAPE.findall(instruction.shape)]
    if instruction.opcode == "collective-permute-start":  # (operand, result, flags)
        return arrays[1]
    if instruction.opcode == "all-gather-start":  # (operands, results)
        arrays = arrays[len(arrays) // 2 :]
    total = sum(arrays)
    return (
        total
        * {
            "all-gather": (count - 1) / count,
            "all-to-all": (count - 1) / count,
            "reduce-scatter": count - 1,
            "all-reduce": 2 * (count - 1) / count,
            "collective-permute": 1,
        }[kind]
    )


def groups(text: str, shape: dict[str, int]) -> np.ndarray | None:
    """Groups of devices [groups, members] of a collective's attributes; None: cannot be read.

    A permutation's groups are its pairs (source, target).
    """
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text)
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text)
    if pairs or listed:
        rows = re.findall(r"\{([\d,]+)\}", (pairs or listed)[1])
        return np.array([[int(i) for i in row.split(",")] for row in rows])
    iota = re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", text)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    named = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", text
    )
    if named:
        mesh, of, order, over = named.groups()
        return _mesh_groups(mesh, over, _iota(of, order) if of else None)
    if "replica_groups={}" in text:
        return np.arange(math.prod(shape.values()))[None]
    return None


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [2,4]T(1,0): 0 to 7 as 2 x 4, transposed


def _iota(of: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(of))).reshape(_numbers(of))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _mesh_groups(mesh: str, over: str, devices: np.ndarray | None) -> np.ndarray | None:
    """mesh['a'=4,'b'=4] {'b'}: the groups that differ in b alone; devices in order, or as given."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    used = re.findall(r"'([^']+)'(:\(\d+\)\d+)?", over)
    if any(part or name not in sizes for name, part in used):
        return None
    names = [name for name, _ in used]
    devices = np.arange(math.prod(sizes.values())) if devices is None else devices
    ids = devices.reshape(tuple(sizes.values()))
    axes = list(sizes)
    last = [axes.index(name) for name in names]
    first = [i for i in range(len(axes)) if i not in last]
    return ids.transpose(first + last).reshape(-1, math.prod(sizes[name] for name in names))


def _varying(members: np.ndarray | None, shape: dict[str, int]) -> str:
    """Mesh axes along which the members of a group differ; '?' where that cannot be read."""
    if members is None or members.max() >= math.prod(shape.values()):
        return "?"
    places = np.stack(np.unravel_index(members, tuple(shape.values())), -1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return "+".join(name for name, yes in zip(shape, differ) if yes) or "-"
