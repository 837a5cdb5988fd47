"""The moments of AdamW and Lion stored in bfloat16 or in 8 bits, and restored inside the update.

Called by `optim.make_optimizer`; no other file knows how moments are stored. The update itself is
optax's and computes in float32. After Dettmers et al. 2022 (arXiv:2110.02861), differing in that:

- Codes are logarithmic: the exponent and the first three bits of the mantissa, counted from the
  largest magnitude of the row (the last dim). That is 8 codes an octave, 16 octaves for the signed
  first moment and 32 for the second, whose root spans 16 again. A second moment that is not 0 never
  becomes 0, as the update would explode: below its least code it is rounded up.
- Rounding is stochastic, up as often as makes the mean right. With b2 = 0.999 a moment moves by
  a thousandth a step, which rounding to the nearest code (or bfloat16) undoes, step after step.
  The draws are a hash of step, leaf and index: the same on every mesh and after a resume.
- A row, not a block of 2,048, shares a scale: codes have the shape of the parameter and scales a
  last dim of 1, so both are split as the parameter is, and nothing is gathered.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, UInt16, UInt32

from easylm_jax.tree import map_named, matches

KEPT = r"(^|/)(scale|bias)$"  # norms and biases stay float32, and leaves below MIN_SIZE
MIN_SIZE = 4096
DROPPED = 20  # of the mantissa's 23 bits
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
MOMENTS = {"adamw": 2, "lion": 1, "adafactor": 0}


class Codes(NamedTuple):
    """A moment in 8 bits: 0, or sign(code) times the float whose log code is zero + |code|.

    A log code is the first bits of a float32: exponent and start of the mantissa.
    """

    codes: Int[Array, "*rows C"]  # int8 with the sign of the moment, or uint8 where it has none
    zero: UInt16[Array, "*rows 1"]  # such that the row's largest has code 127 or 255


def bytes_per_parameter(config: Any) -> float:
    """What the state under an OptimConfig takes in large matrices, without 2 bytes a row (int8).

    Adafactor stores a row and a column of each.
    """
    return float(MOMENTS[config.name] * BYTES[config.state_dtype])


def store_moments(
    optimizer: optax.GradientTransformation, state_dtype: str
) -> optax.GradientTransformation:
    """`optimizer`, whose state has a `count` and moments `mu` or `nu`, with those so stored."""

    def store(state: Any) -> Any:
        def leaf(name: str, x: Array) -> Array | Codes:
            if state_dtype == "float32" or matches(KEPT, name) or x.size < MIN_SIZE:
                return x
            random = random_bits(state.count, name, x.shape)
            if state_dtype == "bfloat16":
                return round_to_bfloat16(x, random)
            return encode(x, random, signed=name.startswith("mu/"))

        return _with_moments(state, lambda moments: map_named(leaf, moments))

    def restore(state: Any) -> Any:
        def leaf(x: Array | Codes) -> Array:
            return decode(x) if isinstance(x, Codes) else x.astype(jnp.float32)

        is_codes = lambda x: isinstance(x, Codes)  # noqa: E731
        return _with_moments(state, lambda moments: jax.tree.map(leaf, moments, is_leaf=is_codes))

    def init(params: Any) -> Any:
        return store(optimizer.init(optax.tree.cast(params, jnp.float32)))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        grads = optax.tree.cast(grads, jnp.float32)
        updates, state = optimizer.update(grads, restore(state), params)
        return updates, store(state)

    return optax.GradientTransformation(init, update)


def _with_moments(state: Any, fn: Any) -> Any:
    return state._replace(**fn({k: getattr(state, k) for k in ("mu", "nu") if hasattr(state, k)}))


def random_bits(step: Int[Array, ""], name: str, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """For every element 32 bits that depend on step, name and index, and not on any layout."""
    leaf, odd = np.uint32(zlib.crc32(name.encode())), np.uint32(0x9E3779B9)
    index = jnp.zeros(shape, jnp.uint32)
    for dim, size in enumerate(shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    return _mix(index * odd ^ _mix(step.astype(jnp.uint32) * odd + leaf))


def _mix(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _drop_bits(
    x: Float[Array, "..."], random: UInt32[Array, "..."], n: int
) -> UInt32[Array, "..."]:
    """The bits of float32 `x` less the last n, rounded up in magnitude as often as they say."""
    return (jax.lax.bitcast_convert_type(x, jnp.uint32) + (random >> (32 - n))) >> n


def round_to_bfloat16(x: Float[Array, "..."], random: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Unbiased."""
    return jax.lax.bitcast_convert_type(_drop_bits(x, random, 16).astype(jnp.uint16), jnp.bfloat16)


def encode(x: Float[Array, "*rows C"], random: UInt32[Array, "*rows C"], *, signed: bool) -> Codes:
    """Unbiased; but unsigned codes (x >= 0) round up all that is above 0 and below the least."""
    size = jnp.abs(x)
    log_codes = _drop_bits(size, random, DROPPED).astype(jnp.int32)
    top = jnp.max(log_codes, axis=-1, keepdims=True)
    zero = jnp.maximum(top - (127 if signed else 255), 0)
    least = _from_log_codes(zero + 1)
    if signed:
        is_least = random.astype(jnp.float32) * np.float32(2**-32) * least < size
    else:
        is_least = size > 0
    codes = jnp.where(size < least, is_least, log_codes - zero)
    codes = jnp.where(x < 0, -codes, codes).astype(jnp.int8 if signed else jnp.uint8)
    return Codes(codes, zero.astype(jnp.uint16))


def decode(stored: Codes) -> Float[Array, "*rows C"]:
    """In float32."""
    codes = stored.codes.astype(jnp.int32)
    size = _from_log_codes(jnp.abs(codes) + stored.zero.astype(jnp.int32))
    return jnp.where(codes == 0, 0.0, jnp.where(codes < 0, -size, size))


def _from_log_codes(log_codes: Int[Array, "..."]) -> Float[Array, "..."]:
    bits = log_codes.astype(jnp.uint32) << DROPPED
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
