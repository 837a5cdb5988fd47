"""The device mesh. Nothing else builds a mesh.

Axes: `replica` (copies of the parameters), `fsdp` (parameters and batch split), `sequence` (long
rows split), `tensor` (heads, feed-forward and vocabulary split).

Devices are joined by a fast network inside a TPU slice or a GPU host, and by a slow one across
them. A spec may say which part of an axis goes over which: "fsdp:-1@replica:2".
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("replica", "fsdp", "sequence", "tensor")
BATCH_AXES = ("replica", "fsdp")  # the axes that split the rows of a batch


def parse_mesh(spec: str, num_devices: int) -> dict[str, int]:
    """Axis sizes from EasyLM's grammar, in the order of `AXES`.

    "1,-1,1,4" lists all four; "fsdp:-1,tensor:4" names some in any order, the rest are 1. One -1 is
    inferred. "WITHIN@ACROSS", such as "1,-1,1,4@2,1,1,1" or "fsdp:-1@replica:2", gives the sizes
    within a slice and across slices; those returned are their products. A leading "!" (see
    `make_mesh`) is ignored here.

    Raises:
      ValueError: malformed, or the sizes do not multiply to `num_devices`.
    """
    within, across = _parse_parts(spec, num_devices)
    return {axis: within[axis] * across[axis] for axis in AXES}


def _parse_parts(spec: str, num_devices: int) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes within and across slices, the -1 inferred."""
    parts = [_parse_sizes(part) for part in spec.removeprefix("!").split("@")]
    if len(parts) > 2 or {} in parts:
        raise ValueError(
            f"mesh {spec!r} is not understood; write four sizes {','.join(AXES)} such as "
            "'1,-1,1,1', or names such as 'fsdp:-1,tensor:4', and after an @ the sizes across "
            "slices or hosts, such as 'fsdp:-1@replica:2'"
        )
    sizes = [size for part in parts for size in part.values()]
    if (unknown := sizes.count(-1)) > 1:
        raise ValueError(f"mesh {spec!r} has {unknown} sizes of -1; only one can be inferred")
    known = math.prod(size for size in sizes if size != -1)
    if num_devices % known or (not unknown and known != num_devices):
        raise ValueError(
            f"mesh {spec!r} needs {'a multiple of ' if unknown else ''}{known} devices, but there "
            f"are {num_devices}; the product of the sizes must be {num_devices}"
        )
    rest = num_devices // known
    within, across = [
        {axis: rest if size == -1 else size for axis, size in part.items()}
        for part in (*parts, dict.fromkeys(AXES, 1))[:2]
    ]
    return within, across


def _parse_sizes(part: str) -> dict[str, int]:
    """Four sizes, or named ones and 1 for the rest; -1 stays. Empty: not understood."""
    fields = part.split(",")
    try:
        if ":" in part:
            named = {name.strip(): int(size) for name, size in (f.split(":") for f in fields)}
            sizes = dict.fromkeys(AXES, 1) | named if len(named) == len(fields) else {}
        else:
            sizes = dict(zip(AXES, map(int, fields), strict=True))
    except ValueError:
        return {}
    understood = list(sizes) == list(AXES) and all(n >= 1 or n == -1 for n in sizes.values())
    return sizes if understood else {}


def make_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `spec` (see `parse_mesh`) over `devices`, by default all of them.

    A leading "!" lets a mesh axis split a physical axis of the TPU torus, where the shape would
    otherwise not fit it. The sizes after an "@" are laid over TPU slices; elsewhere over what jax
    takes for a slice (a GPU host), or else over processes.
    """
    devices = jax.devices() if devices is None else devices
    within, across = (tuple(part.values()) for part in _parse_parts(spec, len(devices)))
    how = dict(allow_split_physical_axes=spec.startswith("!"))
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"})
    parts = math.prod(across)
    if slices > 1 and parts == 1:
        raise ValueError(
            f"mesh {spec!r} does not say what lies across the {slices} TPU slices; write it after "
            f"an @, such as 'fsdp:-1@replica:{slices}'"
        )
    try:
        if parts == 1:
            grid = mesh_utils.create_device_mesh(within, devices, **how)
        else:
            by_process = _split_by(spec, within, across, devices) == "process_index"
            grid = mesh_utils.create_hybrid_device_mesh(
                within, across, devices, process_is_granule=by_process, **how
            )
    except NotImplementedError as error:
        raise ValueError(
            f"mesh {spec!r} does not fit the physical topology of the devices; write '!{spec}' to "
            "let it split a physical axis, or choose other sizes"
        ) from error
    # Auto: the compiler propagates shardings. `jax.make_mesh` would give Explicit, which Linen and
    # the rest of this code are not written for.
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _split_by(
    spec: str, within: tuple[int, ...], across: tuple[int, ...], devices: Sequence[jax.Device]
) -> str:
    """The attribute of a device that tells the parts which the slow network joins."""
    is_tpu = devices[0].platform == "tpu"
    counts = {
        name: Counter(getattr(device, name, 0) for device in devices)
        for name in (("slice_index",) if is_tpu else ("slice_index", "process_index"))
    }
    wanted, size = math.prod(across), math.prod(within)
    for name, count in counts.items():
        if len(count) == wanted and set(count.values()) == {size}:
            return name
    number = "slices" if is_tpu else "processes"
    found = sorted(counts["slice_index" if is_tpu else "process_index"].values())
    raise ValueError(
        f"mesh {spec!r} asks for {wanted} parts of {size} devices across the slow network, but "
        f"there are {len(found)} {number} of {'/'.join(map(str, sorted(set(found))))} devices; let "
        f"the sizes after the @ multiply to {len(found)}{'' if is_tpu else ', or leave them out'}"
    )


def check_divides(sizes: Mapping[str, int], *, rows: int, seq_len: int, num_kv_heads: int) -> None:
    """Raise ValueError unless rows, tokens and heads split over a mesh of `sizes`.

    Parameters are checked against their rules, in `sharding.py`.
    """
    ways = math.prod(sizes[axis] for axis in BATCH_AXES)
    if rows % ways:
        fit = max(rows // ways, 1) * ways
        raise ValueError(
            f"{rows} rows per micro-batch do not split over replica x fsdp = {ways}; {rows % ways} "
            f"are left over; use {fit} or {fit + ways} rows, or a smaller fsdp"
        )
    if seq_len % sizes["sequence"]:
        raise ValueError(
            f"rows of {seq_len} tokens do not split over sequence = {sizes['sequence']}"
        )
    if num_kv_heads % (ways := sizes["tensor"]):
        raise ValueError(
            f"num_kv_heads = {num_kv_heads} do not split over mesh axis tensor = {ways}; use "
            f"tensor = {math.gcd(num_kv_heads, ways)} and more of fsdp or sequence"
        )
