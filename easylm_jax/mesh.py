"""The device mesh and the start-up of several processes. Nothing else builds a mesh.

Axes: `replica` (copies of the parameters), `fsdp` (parameters and batch split), `sequence` (long
rows split), `tensor` (heads, feed-forward and vocabulary split).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("replica", "fsdp", "sequence", "tensor")
BATCH_AXES = ("replica", "fsdp")  # the axes that split the rows of a batch


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Arguments of `jax.distributed.initialize`; Cloud TPU and Slurm need only `initialize`."""

    initialize: bool = False
    coordinator_address: str | None = None  # host:port of process 0
    num_processes: int | None = None
    process_id: int | None = None


def start_processes(config: DistributedConfig) -> None:
    """Join the other processes of the run. Call before anything touches a device."""
    if not config.initialize:
        return
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=config.coordinator_address,
        num_processes=config.num_processes,
        process_id=config.process_id,
    )


def parse_mesh(spec: str, num_devices: int) -> dict[str, int]:
    """Axis sizes from EasyLM's grammar, in the order of `AXES`.

    "1,-1,1,4" lists all four; "fsdp:-1,tensor:4" names some in any order, the rest are 1. One -1 is
    inferred. A leading "!" (see `make_mesh`) is ignored here.

    Raises:
      ValueError: malformed, or the sizes do not multiply to `num_devices`.
    """
    fields = spec.removeprefix("!").split(",")
    try:
        if ":" in spec:
            named = {name.strip(): int(size) for name, size in (f.split(":") for f in fields)}
            sizes = dict.fromkeys(AXES, 1) | named if len(named) == len(fields) else {}
        else:
            sizes = dict(zip(AXES, map(int, fields), strict=True))
    except ValueError:
        sizes = {}
    if list(sizes) != list(AXES) or any(n < 1 and n != -1 for n in sizes.values()):
        raise ValueError(
            f"mesh {spec!r} is not understood; write four sizes {','.join(AXES)} such as "
            "'1,-1,1,1', or names such as 'fsdp:-1,tensor:4'"
        )
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        raise ValueError(f"mesh {spec!r} has {len(unknown)} sizes of -1; only one can be inferred")
    known = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % known or (not unknown and known != num_devices):
        raise ValueError(
            f"mesh {spec!r} needs {'a multiple of ' if unknown else ''}{known} devices, but there "
            f"are {num_devices}; the product of the four sizes must be {num_devices}"
        )
    return {name: num_devices // known if size == -1 else size for name, size in sizes.items()}


def make_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `spec` (see `parse_mesh`) over `devices`, by default all of them.

    A leading "!" lets a mesh axis split a physical axis of the TPU torus, where the shape would
    otherwise not fit it.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(parse_mesh(spec, len(devices)).values())
    try:
        grid = mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=spec.startswith("!")
        )
    except NotImplementedError as error:
        raise ValueError(
            f"mesh {spec!r} does not fit the physical topology of the devices; write '!{spec}' to "
            "let it split a physical axis, or choose other sizes"
        ) from error
    # Auto: the compiler propagates shardings. `jax.make_mesh` would give Explicit, which Linen and
    # the rest of this code are not written for.
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_divides(mesh: Mesh, *, rows: int, seq_len: int, num_kv_heads: int) -> None:
    """Raise ValueError unless `rows` rows of `seq_len` tokens, and the heads, split over the mesh.

    Parameters are checked against their rules, in `sharding.py`.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % ways:
        fit = max(rows // ways, 1) * ways
        raise ValueError(
            f"{rows} rows per micro-batch do not split over replica x fsdp = {ways}; {rows % ways} "
            f"are left over; use {fit} or {fit + ways} rows, or a smaller fsdp"
        )
    if seq_len % mesh.shape["sequence"]:
        raise ValueError(
            f"rows of {seq_len} tokens do not split over sequence = {mesh.shape['sequence']}"
        )
    if num_kv_heads % (ways := mesh.shape["tensor"]):
        raise ValueError(
            f"num_kv_heads = {num_kv_heads} do not split over mesh axis tensor = {ways}; use "
            f"tensor = {math.gcd(num_kv_heads, ways)} and more of fsdp or sequence"
        )
