"""Where the time of a profiled training step goes, by kind of operation.

The profiler says how long each HLO instruction ran, the compiled program says from which part of
the model each one came. The times are those of the profiled run, which is slower than others.
Called by `bench_train.py`.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from jax.profiler import ProfileData

PRODUCTS, ATTENTION, LOSS = "matrix products of layers", "attention", "loss and head"
ELEMENTWISE, OPTIMISER = "rest of the layers", "optimiser, sums of gradients"
OTHER = "no origin known"

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_PRODUCT = re.compile(
    r" (?:dot|convolution)\(|custom_call_target=\"[^\"]*(?:gemm|matmul|dot)", re.I
)


def breakdown(folder: str, hlo: str) -> dict[str, float]:
    """Kind -> its share of the time in operations, the largest first.

    `folder` was given to `jax.profiler.trace`, `hlo` is the text of the compiled program.
    """
    kinds = kinds_of_instructions(hlo)
    total: Counter[str] = Counter()
    for events in _events_by_line(folder):
        for name, nanoseconds in self_times(events).items():
            total[kinds.get(name, OTHER)] += nanoseconds
    return {kind: t / sum(total.values()) for kind, t in total.most_common()}


def kinds_of_instructions(hlo: str) -> dict[str, str]:
    """Name of every instruction of a compiled program -> its kind.

    By the path that JAX gave it (`op_name`), or gave most of what is fused into it.
    """
    bodies: dict[str, list[str]] = {}
    instructions: dict[str, str] = {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            body = bodies.setdefault(header[1], [])
        elif found := _INSTRUCTION.match(line):
            instructions[found[1]] = found[2]
            body.append(found[2])

    def kind(text: str) -> str:
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", text)
        parts = [text, *(bodies[called[1]] if called else [])]
        paths = [path for part in parts for path in re.findall(r'op_name="([^"]+)"', part)]
        if not paths:
            return OTHER
        path = Counter(paths).most_common(1)[0][0]
        return _kind_of_path(path, is_product=any(_PRODUCT.search(part) for part in parts))

    return {name: kind(text) for name, text in instructions.items()}


def _kind_of_path(path: str, *, is_product: bool) -> str:
    if "(loss)" in path or "/loss/" in path:
        return LOSS
    if re.search(r"/attention/(?!(?:q|k|v|o)/)", path):
        return ATTENTION
    if "jvp(" not in path:  # neither forward nor backward
        return OPTIMISER
    return PRODUCTS if is_product else ELEMENTWISE


def self_times(events: Iterable[tuple[int, int, str]]) -> Counter[str]:
    """Total time of each name in (start, duration, name), without what ran inside of it."""
    total: Counter[str] = Counter()
    open_events: list[tuple[int, str]] = []  # (end, name), the innermost last
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        if open_events:
            total[open_events[-1][1]] -= duration
        total[name] += duration
        open_events.append((start + duration, name))
    return total


def _events_by_line(folder: str) -> list[list[tuple[int, int, str]]]:
    """HLO instructions as (start, duration, name), in ns, per GPU stream or thread of the host."""
    # Python 3.12 warns of the types that jaxlib makes, and jaxlib aborts where warnings are errors.
    warnings.filterwarnings("ignore", message="builtin type event", category=DeprecationWarning)
    newest = max(Path(folder).rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    planes = list(ProfileData.from_file(str(newest)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    lines = []
    for plane in devices or planes:
        for line in plane.lines:
            stats = [(event, dict(event.stats)) for event in line.events]
            ops = [(e, str(s["hlo_op"])) for e, s in stats if "hlo_op" in s]
            lines.append([(int(e.start_ns), int(e.duration_ns), name) for e, name in ops])
    return lines
