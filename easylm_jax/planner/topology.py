"""Topologies by name: which exist, how many chips they have, and devices to compile for.

    v5p:8x16x16     one slice of 2,048 chips, a 3D torus
    v5e:16x16@2     two slices, joined by the data-centre network
    cpu:8           this machine, as eight devices
    a100:2048       so many GPUs: for the roofline alone, nothing can be compiled for them here

The devices of a TPU are only described: `libtpu`, which holds the compiler, needs no accelerator.
"""

import dataclasses
import difflib
import importlib.util
import math
import os

import jax
import psutil
from jax.experimental import topologies

from easylm_jax.chips import CHIPS, Chip

# Slices as docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} list them: on the 3D families below one
# cube of 64 these four, then A <= B <= C, each a multiple of 4, up to so many chips.
PLANE = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
LARGEST = {"v4": 4096, "v5p": 6144}
ALIASES = {"v5": "v5p", "v5litepod": "v5e", "v5lite": "v5e"}

# What libtpu looks for on a TPU VM: told here, it neither waits for a metadata server nor prints.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`num_slices` equal slices of `shape` chips each."""

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        return self.num_slices * math.prod(self.shape)

    @property
    def can_compile(self) -> bool:
        return self.chip.name == "cpu" or bool(slice_shapes(self.chip.name))

    def __str__(self) -> str:
        slices = f"@{self.num_slices}" if self.num_slices > 1 else ""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}{slices}"


def slice_shapes(family: str) -> list[tuple[int, ...]]:
    """The slices of a TPU family that there are, smallest first; none for other chips."""
    if family in ("v5e", "v6e"):
        return list(PLANE)
    if (limit := LARGEST.get(family)) is None:
        return []
    edges = range(4, limit // 16 + 1, 4)
    cubes = [
        (a, b, c)
        for a in edges
        for b in range(a, limit // (a * a) + 1, 4)
        for c in range(b, limit // (a * b) + 1, 4)
    ]
    return sorted([*BELOW_A_CUBE, *cubes], key=lambda shape: (math.prod(shape), shape[::-1]))


def parse_topology(name: str) -> Topology:
    """The topology of a name such as those at the top of this file.

    Raises:
      ValueError: no such chip, or no slice of that shape; names the nearest that there are.
    """
    family, _, rest = name.lower().partition(":")
    family = ALIASES.get(family, family)
    size, _, slices = rest.partition("@")
    if family not in CHIPS:
        near = difflib.get_close_matches(family, CHIPS, n=3, cutoff=0.3) or list(CHIPS)
        raise ValueError(
            f"topology {name!r}: there is no chip {family!r}; near it: {', '.join(near)}; write "
            "such as v5p:4x4x8, v5e:16x16@2, cpu:8 or a100:2048"
        )
    try:
        shape, num_slices = tuple(map(int, size.split("x"))), int(slices or 1)
    except ValueError:
        shape, num_slices = (), 0
    shapes = slice_shapes(family)
    counts = shapes or len(shape) == (CHIPS[family].ici_dims or 1)  # of chips: any number
    if min(*shape, num_slices, 1) < 1 or not shape or not counts:
        example = {2: "16x16", 3: "4x4x8"}.get(CHIPS[family].ici_dims, "8")
        raise ValueError(
            f"topology {name!r} is not understood; write CHIP:SIZE or CHIP:SIZE@SLICES, such as "
            f"{family}:{example} or {family}:{example}@2"
        )
    if shapes and shape not in shapes:
        near = sorted(shapes, key=lambda s: _distance(s, shape))[:3]
        listed = ", ".join(f"{family}:{'x'.join(map(str, s))}" for s in near)
        raise ValueError(f"there is no TPU slice {family}:{size}; nearest to it: {listed}")
    chip = CHIPS[family]
    if family == "cpu":  # its devices share the memory of this machine
        total = psutil.virtual_memory().total
        chip = dataclasses.replace(chip, hbm_bytes=total / (num_slices * shape[0]))
    return Topology(chip, shape, num_slices)


def _distance(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[float, float]:
    """How far in chips, then in edges."""
    chips = abs(math.log(math.prod(shape) / math.prod(wanted)))
    edges = zip(sorted(shape), sorted(wanted), strict=False)
    return chips, sum(abs(math.log(a / b)) for a, b in edges)


def devices(topology: Topology) -> list[jax.Device]:
    """The devices of `topology`, one per chip, to compile for; only those of a CPU can run.

    Raises:
      ValueError: `libtpu` is not installed, nothing compiles for this chip here, or this process
        was started with fewer CPU devices.
    """
    family = topology.chip.name
    if family == "cpu":
        if len(jax.devices("cpu")) < topology.num_chips:
            raise ValueError(
                f"topology {topology} needs {topology.num_chips} CPU devices, but this process has "
                f"{len(jax.devices('cpu'))}; set jax_num_cpu_devices before jax starts"
            )
        return jax.devices("cpu")[: topology.num_chips]
    if not topology.can_compile:
        raise ValueError(
            f"nothing can be compiled for {topology} here, only for TPUs and this CPU; leave out "
            "the compiler with --no_compile"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"compiling for {topology} needs the TPU compiler, which runs on any machine: "
            "pip install -e .[plan]"
        )
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    options = {}
    if family == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on a TPU VM
    if topology.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    shape = "x".join(map(str, topology.shape))
    described = topologies.get_topology_desc(f"{family}:{shape}", "tpu", **options)
    return list(described.devices)
