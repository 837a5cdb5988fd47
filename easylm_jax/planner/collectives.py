"""What a compiled program sends between chips: read off its optimised HLO text.

Counts every collective as often as it runs: the trip counts of the loops around it are read from
the conditions and bodies of these loops. The compiler may spell one operation in several ways (an
all-gather as an all-reduce of zero-padded shards, a chain of collective-permutes fed into the
matrix product); it is listed as what it has become, under the name of the code it came from.
`compiled.py` calls it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16}
BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program, as one chip sees it.

    `bytes` is the whole array: what an all-gather makes, what an all-reduce or a reduce-scatter
    sums, what a permute passes on. `times` is how often a step runs it.
    """

    kind: str
    dtype: str
    bytes: int
    times: int
    group_size: int
    axes: tuple[str, ...]  # of the mesh, that the group spans; "slices": between TPU slices
    where: str  # the end of the path of the code it came from, such as "mlp/up/dot_general"

    @property
    def sent_bytes(self) -> float:
        """What a chip sends in a step over the links of a ring, `times` included."""
        n = self.group_size
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        return self.bytes * self.times * share.get(self.kind, (n - 1) / n)


def collectives(hlo: str, mesh_shape: Mapping[str, int]) -> tuple[Collective, ...]:
    """Every collective that spans more than one chip, the one that sends most first."""
    found: dict[str, Collective] = {}
    for path, op, times in _walk(parse(hlo)):
        if op.opcode == "send" and "_xla_megascale_" in op.rest:
            kind, size, axes = *_between_slices(op), ("slices",)
        elif (kind := op.opcode.removesuffix("-start")) in KINDS:
            size, axes = _group(op, mesh_shape)
        else:
            continue
        if size == 1:
            continue
        # An asynchronous collective is fused into the work that hides it: it appears in every
        # computation that moves it on, also in loops. It is run where it is run least often.
        # The TPU compiler's fusion of a sum and a slice of it is no such part, and shares channels.
        scatters = path[-1].computation.startswith("all-reduce-scatter")
        channel = re.search(r"channel_id=(\d+)", op.rest)
        hides = path[-1].fused and not scatters
        key = channel[0] if channel and hides else f"{path} {op.name}"
        if key not in found or times < found[key].times:
            dtype, num_bytes = _payload(op, kind, size)
            if scatters:
                kind = "reduce-scatter"
            found[key] = Collective(kind, dtype, num_bytes, times, size, axes, _where(op, path[-1]))
    return tuple(sorted(found.values(), key=lambda c: -c.sent_bytes))


# ---- the text -----------------------------------------------------------------------------------


class Op(NamedTuple):
    """One line of HLO."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes; for a constant its value comes first
    is_root: bool


Computation = dict[str, Op]


def parse(hlo: str) -> dict[str, Computation]:
    """Computations by name; the entry computation is "ENTRY"."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[header[1] and "ENTRY" or header[2]] = {}
        elif op := _parse_line(line):
            current[op.name] = op
    return computations


def _parse_line(line: str) -> Op | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    type_end = (
        _closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
    )
    opcode = re.match(r" ?([\w\-]+)\(", line[type_end:])
    if not opcode:
        return None
    start = type_end + opcode.end() - 1
    end = _closing(line, start)
    inside = line[start + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    rest = inside + line[end:] if opcode[1] == "constant" else line[end:]
    return Op(head[2], line[head.end() : type_end], opcode[1], operands, rest, bool(head[1]))


def _closing(line: str, start: int) -> int:
    """The index behind the bracket that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", line[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.end()
    return len(line)


# ---- loops --------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One step down from the entry: through a loop, or into a fusion or a call."""

    name: str
    computation: str
    fused: bool
    rest: str  # attributes of the loop, fusion or call


def _walk(
    computations: dict[str, Computation],
) -> Iterator[tuple[tuple[Step, ...], Op, int]]:
    """(way down to it, operation, how often a step runs it) for every operation."""
    inside = {"while": "body", "call": "to_apply", "fusion": "calls", "async-start": "calls"}
    todo = [((Step("", "ENTRY", False, ""),), 1)]
    while todo:
        path, times = todo.pop()
        around = computations[path[-1].computation]
        for op in around.values():
            yield path, op, times
            if op.opcode in inside:
                fused = op.opcode == "fusion"
                step = Step(op.name, _called(op, inside[op.opcode]), fused, op.rest)
                loop = op.opcode == "while"
                again = trip_count(computations, around, op) if loop else 1
                todo.append(((*path, step), times * again))


def _called(op: Op, attribute: str) -> str:
    return re.search(rf"{attribute}=%?([\w.\-]+)", op.rest)[1]


def trip_count(computations: dict[str, Computation], around: Computation, loop: Op) -> int:
    """How often `loop` runs; 1 where that is decided at run time, as over attention tiles."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = computations[_called(loop, "condition")]
    body = computations[_called(loop, "body")]
    compare = next(op for op in condition.values() if op.is_root)
    if compare.opcode != "compare" or "direction=LT" not in compare.rest:
        return 1
    counter, bound = (condition[name] for name in compare.operands)
    place = re.search(r"index=(\d+)", counter.rest)
    if bound.opcode != "constant" or not place:
        return 1
    index = int(place[1])
    root = next(op for op in body.values() if op.is_root)
    step = _increment(body, root.operands[index], index)
    first = around[loop.operands[0]]
    start = around.get(first.operands[index]) if first.opcode == "tuple" else None
    begin = _constant(start) if start and start.opcode == "constant" else 0
    return math.ceil((_constant(bound) - begin) / step)


def _increment(body: Computation, name: str, index: int) -> int:
    """What the loop's body adds to its counter; an unrolled body may add 2."""
    total, op = 0, body[name]
    while op.opcode in ("add", "copy"):
        parts = [body[operand] for operand in op.operands]
        total += sum(_constant(part) for part in parts if part.opcode == "constant")
        op = next(part for part in parts if part.opcode != "constant")
    return total or 1


def _constant(op: Op) -> int:
    return int(re.match(r"-?\d+", op.rest)[0])


# ---- one collective -----------------------------------------------------------------------------


def _between_slices(op: Op) -> tuple[str, int]:
    """(kind, number of slices) of what one slice's network hands to the next."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest)[1]
    first, *_, last = re.findall(r"\d+", re.search(r'megascale_target="\{(.*?)\}', op.rest)[1])
    return kind.lower().replace("_", "-"), int(last) - int(first) + 1


def _payload(op: Op, kind: str, group_size: int) -> tuple[str, int]:
    """(type of the largest part, bytes); see `Collective`."""
    parts = re.findall(r"(\w+)\[([\d,]*)\]", op.type)
    sizes = [
        (BITS[dtype] * math.prod(int(n) for n in dims.split(",") if n) // 8, dtype)
        for dtype, dims in parts
        if dtype in BITS
    ]
    largest, dtype = max(sizes)
    is_start = op.opcode.endswith("-start") and kind != "all-reduce"
    if is_start or op.opcode == "send":  # operands, results, context
        return dtype, largest
    total = sum(size for size, _ in sizes)
    return dtype, total * group_size if kind == "reduce-scatter" else total


def _group(op: Op, mesh_shape: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Chips that take part together, and the mesh axes along which they lie."""
    sizes = tuple(mesh_shape.values())
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", op.rest)
    if pairs:
        members = [_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
        axes = set().union(*(_axes(pair, sizes) for pair in members))
        size = math.prod(sizes[axis] for axis in axes)
    else:
        members = _replicas(op.rest, math.prod(sizes))
        axes, size = _axes(members, sizes), len(members)
    return size, tuple(name for i, name in enumerate(mesh_shape) if i in axes)


def _axes(devices: Sequence[int], sizes: tuple[int, ...]) -> set[int]:
    places = np.stack(np.unravel_index(np.asarray(devices), sizes))
    return {axis for axis, along in enumerate(places) if len(set(along.tolist())) > 1}


def _replicas(rest: str, num_devices: int) -> list[int]:
    """The devices of the first group, in any of the three notations."""
    ids = np.arange(num_devices)
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", rest
    )
    if named:
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", named[1]), strict=True)
        if order := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", named[2] or ""):
            ids = _transposed(ids, order[1], order[2])
        grid = ids.reshape([int(n) for n in sizes])
        used = re.findall(r"'(\w+)'", named[3])
        return grid[tuple(slice(None) if n in used else 0 for n in names)].reshape(-1).tolist()
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        grid = _transposed(ids, iota[2], iota[3])
        return grid.reshape(_numbers(iota[1]))[0].tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return _numbers(listed[1]) if listed else list(range(num_devices))


def _transposed(ids: np.ndarray, shape: str, order: str | None) -> np.ndarray:
    grid = ids.reshape(_numbers(shape))
    return (grid.transpose(_numbers(order)) if order else grid).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _where(op: Op, inside: Step) -> str:
    """The end of the path of its code: the layer and what is done, without loops and transforms."""
    path = re.search(r'op_name="([^"]*)"', op.rest if "op_name" in op.rest else inside.rest)
    names = [
        name
        for name in (path[1] if path else op.name).split("/")
        if name not in ("while", "body", "cond", "closed_call", "checkpoint") and name[-1:] != ")"
    ]
    backward = "backward " if path and "transpose(" in path[1] else ""
    return backward + "/".join(names[-3:])
