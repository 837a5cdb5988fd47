"""Kernels in 4 and 8 bits: levels, error, and the linear layer that reads them."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.mesh import make_mesh
from easylm_jax.models.linear import Linear
from easylm_jax.models.llama import PARAM_RULES
from easylm_jax.models.quantized import (
    NF4_LEVELS,
    dequantize,
    num_parameters,
    quantize,
    quantize_base,
)
from easylm_jax.sharding import tree_shardings
from easylm_jax.tree import named_leaves, num_elements
from tests.tiny import assert_close, tiny_params

LEVELS = {
    "nf4": np.array(NF4_LEVELS),
    "int4": np.arange(-7, 8) / 7,
    "int8": np.arange(-127, 128) / 127,
}
FORMATS = pytest.mark.parametrize("how", LEVELS)


def draw(shape=(2, 192, 24), seed=0):
    """Normal numbers whose scale differs by block."""
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(size=(shape[0], shape[1] // 64, 1, shape[2])).repeat(64, 2)
    return jnp.asarray(rng.normal(size=shape) * scale.reshape(shape), jnp.float32)


def by_blocks(x):
    return np.asarray(x, np.float64).reshape(2, 3, 64, 24)


@FORMATS
def test_every_number_becomes_the_nearest_level_of_its_block(how):
    kernel = draw()
    leaves = quantize(kernel, how)
    blocks, levels = by_blocks(kernel), LEVELS[how]
    absmax = np.abs(blocks).max(2, keepdims=True)
    distance = np.abs((blocks / absmax)[..., None] - levels)
    nearest = levels[distance.argmin(-1)] * absmax
    got = by_blocks(dequantize(leaves, jnp.float32))
    assert_close(got, nearest, rtol=1e-6)
    bound = np.diff(levels).max() / 2 * absmax
    assert (np.abs(got - blocks) <= bound * (1 + 1e-5)).all()
    assert jnp.iinfo(leaves[how].dtype).bits == (8 if how == "int8" else 4)


@FORMATS
def test_what_lies_on_the_levels_comes_back_exactly_and_zeros_stay_zeros(how):
    rng = np.random.default_rng(0)
    units = rng.choice(LEVELS[how], size=(2, 3, 64, 24))
    units[:, :, 0] = 1.0
    absmax = 2.0 ** rng.integers(-3, 3, size=(2, 3, 1, 24))
    absmax[0, 1] = 0.0
    kernel = jnp.asarray((units * absmax).reshape(2, 192, 24), jnp.float32)
    leaves = quantize(kernel, how)
    assert (leaves[how][0, 64:128] == (7 if how == "nf4" else 0)).all()
    rounding = 0 if how == "nf4" else 2**-23  # sevenths are no floats
    assert_close(dequantize(leaves, jnp.float32), kernel, rtol=rounding)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_codes_are_those_of_qwix(how):
    qwix = pytest.importorskip("qwix")
    kernel, qtype = draw(), "nf4" if how == "nf4" else jnp.int8
    theirs = qwix.quantize(kernel, qtype, tiled_axes={1: 64}, channelwise_axes=(0, 2))
    ours = quantize(kernel, how)
    if how == "nf4":
        np.testing.assert_array_equal(ours["nf4"], theirs.qvalue)
        np.testing.assert_array_equal(dequantize(ours, jnp.float32), qwix.dequantize(theirs))
    else:  # whose largest code stands for 127.5, not 127
        difference = ours["int8"].astype(jnp.int32) - theirs.qvalue.astype(jnp.int32)
        assert jnp.abs(difference).max() <= 1


@FORMATS
def test_a_linear_layer_computes_with_the_dequantised_kernel(how):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 192)), jnp.bfloat16)
    kernel, layer = draw()[0], Linear(24, nn.initializers.zeros)
    leaves = quantize(kernel, how)
    plain = dequantize(leaves, jnp.float32)
    assert (plain != kernel).mean() > 0.9

    def value_and_dx(params):
        y, vjp = jax.vjp(lambda x: layer.apply({"params": params}, x), x)
        return y, vjp(y)[0]

    expected = value_and_dx({"kernel": plain})
    jax.tree.map(np.testing.assert_array_equal, value_and_dx(leaves), expected)


def test_codes_are_split_where_blocks_are_not_and_dequantised_without_gathering_them():
    """Two devices have 24 of 48 rows each, and blocks are of 16."""
    mesh, how = make_mesh("1,4,1,2"), "nf4"
    plain = {"layers_0": {"mlp": {"down": {"kernel": draw((1, 192, 24))[0, :48]}}}}
    plain = jax.device_put(plain, tree_shardings(plain, mesh, PARAM_RULES))
    shapes = jax.eval_shape(functools.partial(quantize_base, how=how), plain)
    places = tree_shardings(shapes, mesh, PARAM_RULES)
    leaves = quantize_base(plain, how, places)["layers_0"]["mlp"]["down"]
    shards = {name: x.addressable_shards[0].data.shape for name, x in leaves.items()}
    assert shards == {"nf4": (48 // 2, 24 // 4), "absmax": (3, 24 // 4)}
    alone = quantize(draw((1, 192, 24))[0, :48], how)
    jax.tree.map(np.testing.assert_array_equal, leaves, alone)
    out = plain["layers_0"]["mlp"]["down"]["kernel"].sharding
    whole = jax.jit(functools.partial(dequantize, dtype=jnp.float32), out_shardings=out)
    program = whole.lower(leaves).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", program)
    np.testing.assert_array_equal(whole(leaves), dequantize(alone, jnp.float32))


@FORMATS
def test_no_more_than_a_layer_is_in_float32_at_once(how):
    kernel = jax.ShapeDtypeStruct((16, 192, 64), jnp.float32)  # XLA on CPU widens all of bfloat16
    compiled = jax.jit(quantize, static_argnums=1).lower(kernel, how).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * 192 * 64


def test_the_kernels_of_the_layers_are_quantised_and_nothing_else():
    before = named_leaves(tiny_params())
    after = named_leaves(quantize_base(tiny_params(), "int4"))
    gone = set(before) - set(after)
    assert len(gone) == 7 and all(n.startswith("layers/") and n.endswith("kernel") for n in gone)
    new = {n.removesuffix("kernel") + leaf for n in gone for leaf in ("int4", "absmax")}
    assert set(after) - set(before) == new
    for name in set(before) & set(after):
        assert after[name] is before[name] or (after[name] == before[name]).all()
    assert num_parameters(after) == num_parameters(before) == num_elements(tiny_params())
    assert after["layers/mlp/down/absmax"].shape == (2, 48 // 16, 32)  # 16: gcd of 48 and 64
