"""Every table of names is a bijection with our parameters, and reordered pairs are RoPE's pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.formats import names
from easylm_jax.formats.foreign import Model, abstract_params, foreign_shapes, foreign_tensors
from easylm_jax.formats.names import to_foreign, to_ours
from easylm_jax.models.decoding import unstack_layers
from easylm_jax.models.llama import rope_frequencies
from easylm_jax.tree import named_leaves
from tests.tiny import tiny_config

TABLES = {
    "hf": names.HF,
    "meta": names.META,
    "easylm": names.EASYLM,
    "gguf_llama": names.GGUF_LLAMA,
    "gguf_qwen2": names.GGUF_QWEN2,
}

CONFIGS = {
    "mha": tiny_config(num_kv_heads=4),
    "gqa": tiny_config(num_layers=3, head_dim=6),
    "tied": tiny_config(tie_embeddings=True),
    "bias": tiny_config(qkv_bias=True),
}
HAVE_BIASES = ("hf", "gguf_llama", "gguf_qwen2")  # Meta's and EasyLM's models have none
PAIRS = [
    (table, config)
    for table in TABLES
    for config in CONFIGS
    if config != "bias" or table in HAVE_BIASES
]


@pytest.mark.parametrize("table, config", PAIRS)
def test_each_parameter_has_one_name_and_comes_back_bit_for_bit(table, config):
    table, config = TABLES[table], CONFIGS[config]
    leaves, rng = named_leaves(abstract_params(config)), np.random.default_rng(0)
    assert len({e.ours for e in table}) == len({e.foreign for e in table}) == len(table)
    assert leaves.keys() <= {e.ours for e in table}
    shapes, expected_count = foreign_shapes(table, config), 0
    for entry in table:
        if entry.ours not in leaves:
            continue
        shape, names = leaves[entry.ours].shape, [entry.foreign]
        if entry.ours.startswith("layers/"):
            names = [entry.foreign.replace("{layer}", str(i)) for i in range(shape[0])]
            shape = shape[1:]
        expected_count += len(names)
        x = rng.normal(size=shape).astype(np.float32)
        theirs = to_foreign(entry, x, config)
        assert all(shapes[name] == theirs.shape for name in names)
        back = to_ours(entry, theirs, config)
        assert back.shape == x.shape and back.tobytes() == x.tobytes()
        assert to_foreign(entry, back, config).tobytes() == theirs.tobytes()
        assert sorted(theirs.ravel()) == sorted(x.ravel())  # moved, not mixed
    assert len(shapes) == expected_count  # no two parameters share a name


@pytest.mark.parametrize("table", [t for t in TABLES if any(e.pairs for e in TABLES[t])])
def test_rotating_neighbours_there_is_rotating_halves_here(table):
    """Heads of a foreign projection, rotated as complex numbers, against ours rotated by hand."""
    config = dataclasses.replace(CONFIGS["gqa"], head_dim=10)
    rng = np.random.default_rng(1)
    x_TD = rng.normal(size=(7, config.d_model))
    angles_T1I = np.arange(7)[:, None, None] * rope_frequencies(config)
    for entry in TABLES[table]:
        if entry.pairs is None or not entry.ours.endswith("kernel"):
            continue
        heads = config.num_heads if entry.pairs == "q" else config.num_kv_heads
        w_DM = rng.normal(size=(config.d_model, heads * config.head_dim))
        y_TNH = (x_TD @ w_DM).reshape(7, heads, config.head_dim)
        pairs = y_TNH[..., 0::2] + 1j * y_TNH[..., 1::2]
        expected = pairs * np.exp(1j * angles_T1I)

        ours_DM = to_ours(entry, w_DM.T if entry.transpose else w_DM, config)
        first, second = np.split((x_TD @ ours_DM).reshape(y_TNH.shape), 2, axis=-1)
        cos, sin = np.cos(angles_T1I), np.sin(angles_T1I)
        got = (first * cos - second * sin) + 1j * (second * cos + first * sin)
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_biases_are_reordered_as_their_kernels():
    """A bias is one more input that is always 1: the last row of the kernel."""
    config, table = CONFIGS["bias"], {e.ours: e for e in TABLES["gguf_llama"]}
    for name in "qk":
        kernel, bias = (table[f"layers/attention/{name}/{leaf}"] for leaf in ("kernel", "bias"))
        heads = config.num_heads if name == "q" else config.num_kv_heads
        w = np.random.default_rng(2).normal(size=(heads * config.head_dim, 3))
        expected = to_ours(kernel, w, config)[-1]
        np.testing.assert_array_equal(to_ours(bias, w[:, -1], config), expected)


def test_layers_of_their_own_are_written_as_stacked_ones():
    """As `load` holds them; the shapes that a file must have do not depend on it either."""
    config, rng = CONFIGS["bias"], np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract_params(config)
    )
    stacked = {k: x.tobytes() for k, x in foreign_tensors(Model(config, params), TABLES["hf"])}
    apart = Model(dataclasses.replace(config, scan_layers=False), unstack_layers(params))
    tensors = dict(foreign_tensors(apart, TABLES["hf"]))
    assert {name: x.tobytes() for name, x in tensors.items()} == stacked
    shapes = {name: x.shape for name, x in tensors.items()}
    assert shapes == foreign_shapes(TABLES["hf"], apart.config)
    with pytest.raises(ValueError, match="no tensor for layers/attention/k/bias"):
        dict(foreign_tensors(apart, TABLES["meta"]))
