"""The one table of chips: what each can compute, hold and send.

Plain numbers of one jax device, which on all of these but TPU v2 and v3 (half a chip) and tpu7x
(two devices share the chip that is given) is one chip. `metrics.py` reads the peak that MFU is
measured against, the planner everything else.
"""

import dataclasses

GB, GIB = 1e9, 2.0**30
NONE = 0.0


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. Bandwidths are in bytes/s; 0 where there is no such network or no figure.

    `ici_bandwidth` is what a chip can send over all its fast links at once, in one direction: a
    TPU's 2 x `ici_dims` links of the torus, so that one torus axis used both ways round has
    `ici_bandwidth / ici_dims`; a GPU's NVLinks. `dcn_bandwidth` is this chip's share of its host's
    network cards, in one direction.
    """

    name: str
    kinds: tuple[str, ...]  # parts of jax's `device_kind` that mean this chip
    peak_flops: float  # dense bf16 matrix products per second, from the vendor's data sheet
    hbm_bytes: float  # what one program may use
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_dims: int  # of the torus: 2 or 3; 0: no torus
    dcn_bandwidth: float
    source: str  # of what is not from the family's note below


# TPU: peaks, HBM bandwidth and ICI of v4, v5e, v5p and v6e are from docs.cloud.google.com/tpu/docs
# (v5p: 1,200 GB/s in both directions; v4 has no figure for ICI there), DCN of v5e and v5p too (50
# Gbit/s a chip for v5p). ICI of v4, DCN of v4 and v6e, all of v2, v3 and tpu7x, and bandwidths of
# GPUs are as commonly quoted and were not looked up. `hbm_bytes` of v4 to v6e is the limit that the
# compiler itself names when a program does not fit ("Used 20.1G of 15.75G hbm").
_TPU = "TPU documentation; HBM limit from the compiler"
_GPU = "data sheet; 8 GPUs share NVLink; one network card per GPU"
_CARD = "data sheet; no fast links"

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v2", ("TPU v2",), 22.5e12, 8 * GIB, 350 * GB, NONE, 2, NONE, "TPU documentation"),
        Chip("v3", ("TPU v3",), 61.5e12, 16 * GIB, 450 * GB, NONE, 2, NONE, "TPU documentation"),
        Chip("v4", ("TPU v4",), 275e12, 30.75 * GIB, 1200 * GB, 300 * GB, 3, 6.25 * GB, _TPU),
        Chip(
            *("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819 * GB),
            *(200 * GB, 2, 3.125 * GB, _TPU),
        ),
        Chip(
            *("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765 * GB),
            *(600 * GB, 3, 6.25 * GB, _TPU),
        ),
        Chip(
            *("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1638 * GB),
            *(400 * GB, 2, 12.5 * GB, _TPU),
        ),
        Chip("tpu7x", ("TPU7x",), 2307e12, 192 * GIB, 7370 * GB, 600 * GB, 3, 12.5 * GB, _TPU),
        Chip("a100", ("A100",), 312e12, 80 * GB, 2039 * GB, 300 * GB, 0, 25 * GB, _GPU),
        Chip("h100", ("H100",), 989.4e12, 80 * GB, 3350 * GB, 450 * GB, 0, 50 * GB, _GPU),
        Chip("h100_pcie", ("H100 PCIe",), 756e12, 80 * GB, 2000 * GB, NONE, 0, NONE, _CARD),
        Chip("h100_nvl", ("H100 NVL",), 835e12, 94 * GB, 3900 * GB, NONE, 0, NONE, _CARD),
        Chip("h200", ("H200",), 989.4e12, 141 * GB, 4800 * GB, 450 * GB, 0, 50 * GB, _GPU),
        Chip("b200", ("B200",), 2250e12, 180 * GB, 7700 * GB, 900 * GB, 0, 50 * GB, _GPU),
        Chip("gb200", ("GB200",), 2500e12, 186 * GB, 8000 * GB, 900 * GB, 0, 50 * GB, _GPU),
        Chip("a10g", ("A10G",), 70e12, 24 * GB, 600 * GB, NONE, 0, NONE, _CARD),
        Chip("l4", ("L4",), 121e12, 24 * GB, 300 * GB, NONE, 0, NONE, _CARD),
        Chip("l40", ("L40",), 181e12, 48 * GB, 864 * GB, NONE, 0, NONE, _CARD),
        Chip("l40s", ("L40S",), 362e12, 48 * GB, 864 * GB, NONE, 0, NONE, _CARD),
        Chip("rtx3090", ("RTX 3090",), 71e12, 24 * GB, 936 * GB, NONE, 0, NONE, _CARD),
        Chip("rtx4090", ("RTX 4090",), 165.2e12, 24 * GB, 1008 * GB, NONE, 0, NONE, _CARD),
        # Devices of a CPU share one memory and no figure holds for all machines: no roofline.
        Chip("cpu", (), NONE, NONE, NONE, NONE, 0, NONE, "unknown"),
    )
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip whose longest kind is part of `device_kind`; None where none is."""
    matches = [
        (len(kind), chip)
        for chip in CHIPS.values()
        for kind in chip.kinds
        if kind.lower() in device_kind.lower()
    ]
    return max(matches, key=lambda match: match[0])[1] if matches else None
