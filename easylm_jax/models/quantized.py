"""Frozen kernels held in 4 or 8 bits, for adapters to be trained on (QLoRA, arXiv:2305.14314).

A quantised kernel is two leaves in place of "kernel", named by the format: {"nf4": codes [in, out],
"absmax": [in / block, out]}. `Linear` dequantises it where it is used, so that inside the scan over
layers one layer at a time is whole. Four-bit types of JAX are packed, two numbers to a byte, on all
backends; `nbytes` does not know it.

Kernels are quantised one layer at a time, so that no more than one layer is ever in float32.

What it is not: quantised arithmetic, or a way to train what is quantised. QLoRA's second
quantisation, of the scales, is left out: it would save 0.37 of 4.5 bits.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from easylm_jax.array_types import Params
from easylm_jax.tree import matches, named_leaves

Format = Literal["nf4", "int4", "int8"]
BLOCK = 64  # weights of one output that share a scale, as in QLoRA
KERNEL = r"^layers.*/kernel$"  # what is quantised: the linear layers of the blocks

# NormalFloat: quantiles of the normal distribution, with 0 and both ends exact (appendix E).
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Format -> type of the codes, and the largest one. Integers are symmetric: code / largest * absmax.
CODES = {"nf4": (jnp.uint4, 15), "int4": (jnp.int4, 7), "int8": (jnp.int8, 127)}


def quantize(kernel: Float[Array, "*L D F"], how: Format) -> dict[str, Array]:
    """The leaves that stand for `kernel`: every number rounded to the nearest level of its block.

    Blocks run along the input dim, `BLOCK` long or the largest part of it that divides.
    """
    if kernel.ndim > 2:
        return jax.lax.map(functools.partial(quantize, how=how), kernel)
    D, F = kernel.shape
    block = math.gcd(D, BLOCK)
    blocks = kernel.astype(jnp.float32).reshape(D // block, block, F)
    absmax = jnp.abs(blocks).max(-2)
    unit = blocks / jnp.where(absmax == 0, 1.0, absmax)[..., None, :]
    dtype, largest = CODES[how]
    if how == "nf4":
        levels = np.array(NF4_LEVELS)
        codes = jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2, jnp.float32), unit)
    else:
        codes = jnp.round(unit * largest)
    return {how: codes.astype(dtype).reshape(kernel.shape), "absmax": absmax}


def is_quantized(leaves: Params) -> bool:
    """Whether these leaves of one linear layer hold its kernel quantised."""
    return "absmax" in leaves


def dequantize(leaves: Params, dtype: DTypeLike) -> Float[Array, "*L D F"]:
    """The kernel that quantised leaves stand for.

    Codes are not cut into blocks but scales spread over them, as a device's part of the codes need
    not be whole blocks.
    """
    how = next(name for name in CODES if name in leaves)
    codes, absmax = leaves[how], leaves["absmax"]
    *lead, num_blocks, F = absmax.shape
    if how == "nf4":
        unit = jnp.asarray(NF4_LEVELS, jnp.float32)[codes.astype(jnp.int32)]
    else:
        unit = codes.astype(jnp.float32) / CODES[how][1]
    block = codes.shape[-2] // num_blocks
    spread = jnp.broadcast_to(absmax[..., None, :], (*lead, num_blocks, block, F))
    return (unit * spread.reshape(codes.shape)).astype(dtype)


def quantize_base(params: Params, how: Format, shardings: Params | None = None) -> Params:
    """`params` with the kernels of all linear layers of the blocks quantised, as QLoRA does.

    Embedding, head and norms stay as they are. `shardings`, a tree like the result, says where the
    codes and scales shall lie.
    """
    places = flatten_dict(shardings or {}, sep="/")
    flat = {}
    for name, leaf in flatten_dict(params, sep="/").items():
        if matches(KERNEL, name):
            path = name.removesuffix("kernel")
            place = {part: places.get(path + part) for part in (how, "absmax")}
            quantized = jax.jit(quantize, static_argnums=1, out_shardings=place)(leaf, how)
            flat |= {path + part: x for part, x in quantized.items()}
        else:
            flat[name] = leaf
    return unflatten_dict(flat, sep="/")


def num_parameters(params: Params) -> int:
    """How many numbers `params` hold, the scales of quantised kernels not counted."""
    return sum(leaf.size for name, leaf in named_leaves(params).items() if "absmax" not in name)
