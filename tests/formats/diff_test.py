"""Diffs across formats: exact ones give every bit back, others EasyLM's sums; sizes, checksums."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from easylm_jax.formats import diff
from easylm_jax.formats.easylm import open_easylm, write_easylm
from easylm_jax.formats.foreign import (
    Foreign,
    Model,
    foreign_shapes,
    foreign_tensors,
    import_params,
)
from easylm_jax.formats.meta import open_meta, write_meta
from easylm_jax.formats.names import EASYLM, GGUF_QWEN2, HF, META
from tests.tiny import on_one_device, tiny_config, tiny_params

CONFIG = tiny_config()


def in_memory(table, params, path="memory"):
    params = jax.tree.map(jnp.asarray, params)
    tensors = dict(foreign_tensors(Model(CONFIG, params), table))
    shapes = {name: x.shape for name, x in tensors.items()}
    return Foreign(path, CONFIG, table, shapes, tensors.__getitem__)


def moved(params, *, by=0.3, seed=1):
    """The parameters with noise of every size, in bits that float32 sums do not keep."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (np.asarray(x, np.float64) + by * rng.normal(size=x.shape)).astype(np.float32),
        params,
    )


BASE = tiny_params()
TARGET = moved(BASE)


def tensors(foreign):
    """All of a model in our layout."""
    ours = diff.in_our_layout(foreign)
    return {name: ours.read(name) for name in ours.shapes}


@pytest.mark.parametrize("tables", [(HF, HF), (META, HF), (EASYLM, META), (HF, GGUF_QWEN2)])
def test_exact_diffs_give_every_bit_back_whatever_the_formats(tables):
    base, target = in_memory(tables[0], BASE), in_memory(tables[1], TARGET)
    delta = diff.subtract(target, base, exact=True)
    assert any(np.isnan(x).any() for x in tensors(delta).values())  # patterns, not numbers
    got, expected = tensors(diff.add(base, delta, exact=True)), tensors(in_memory(HF, TARGET))
    assert {n: x.tobytes() for n, x in got.items()} == {n: x.tobytes() for n, x in expected.items()}


def test_float_diffs_are_differences_and_almost_give_the_target_back():
    base, target = in_memory(EASYLM, BASE), in_memory(META, TARGET)
    delta = diff.subtract(target, base)
    again = tensors(diff.add(base, delta))
    b, t = tensors(in_memory(HF, BASE)), tensors(in_memory(HF, TARGET))
    for name, d in tensors(delta).items():
        np.testing.assert_array_equal(d, t[name] - b[name])
        ulp = np.spacing(np.maximum(np.abs(t[name]), np.abs(b[name])))
        assert np.all(np.abs(again[name] - t[name]) <= ulp)
    assert any((again[name] != t[name]).any() for name in t)  # why there are exact ones


def test_bfloat16_diffs_give_what_easylm_recovers():
    """EasyLM adds two bfloat16 arrays; its result is ours once that is stored in bfloat16."""
    narrow = jax.tree.map(lambda x: np.asarray(x, ml_dtypes.bfloat16), BASE)
    steps = jax.tree.map(lambda t, b: np.asarray(t - b, ml_dtypes.bfloat16), TARGET, BASE)
    summed = jax.tree.map(lambda b, d: np.asarray(b + d, np.float32), narrow, steps)
    got = tensors(diff.add(in_memory(EASYLM, narrow), in_memory(EASYLM, steps)))
    for name, expected in tensors(in_memory(HF, summed)).items():
        np.testing.assert_array_equal(got[name].astype(ml_dtypes.bfloat16), expected)


def test_checksum_is_of_the_model_not_of_the_format():
    sums = {diff.checksum(in_memory(table, BASE)) for table in (HF, META, EASYLM, GGUF_QWEN2)}
    assert len(sums) == 1
    changed = jax.tree.map(np.array, BASE)
    changed["layers"]["mlp"]["up"]["kernel"][1, 2, 3] += 1e-6
    assert diff.checksum(in_memory(HF, changed)) not in sums


@pytest.mark.parametrize("exact", [False, True])
def test_diff_on_disk_with_its_record(tmp_path, exact):
    write_meta(Model(CONFIG, BASE), str(tmp_path / "base"))
    base, target = open_meta(str(tmp_path / "base")), in_memory(HF, TARGET)
    params = import_params(diff.subtract(target, base, exact=exact), on_one_device(CONFIG))
    path = str(tmp_path / "diff")
    write_easylm(Model(CONFIG, params), path)
    expected = diff.checksum(target)
    result = diff.add(base, open_easylm(path), exact=exact)
    said = diff.save_record(path, result, target_sha256=expected, exact=exact)
    assert (said == expected) is exact

    full = diff.add(base, open_easylm(f"params::{path}"))
    assert diff.check_result(full, path) == said
    other = in_memory(HF, moved(BASE, by=1e-6, seed=2), path="another base")
    with pytest.raises(ValueError, match="another base .* has the checksum .* expected"):
        diff.check_result(diff.add(other, open_easylm(path)), path)


def test_exact_diffs_are_not_stored_in_narrower_types(tmp_path):
    base, target = in_memory(HF, BASE), in_memory(HF, TARGET)
    params = import_params(diff.subtract(target, base, exact=True), on_one_device(CONFIG))
    path = str(tmp_path / "diff")
    with np.errstate(invalid="ignore"):
        write_easylm(Model(CONFIG, params), path, dtype="bfloat16")
    result = diff.add(base, open_easylm(path), exact=True)
    with pytest.raises(ValueError, match="does not give its target back: store it in float32"):
        diff.save_record(path, result, target_sha256=diff.checksum(target), exact=True)


def test_sizes_are_checked_tensor_by_tensor():
    def unread(path, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        return Foreign(path, config, HF, foreign_shapes(HF, config), read=np.zeros)

    base = unread("base")
    expected = r"tensor embed/embedding, expected \[64, 32\], got \[65, 32\]"
    with pytest.raises(ValueError, match=f"other does not fit the base base: {expected}"):
        diff.add(base, unread("other", vocab_size=65))
    with pytest.raises(ValueError, match=r"lm_head/kernel, expected \[32, 64\], got none"):
        diff.subtract(unread("tied", tie_embeddings=True), base)
    with pytest.raises(ValueError, match=r"\(4, 2\) query and key/value heads, got \(2, 1\)"):
        diff.subtract(unread("wide", num_heads=2, num_kv_heads=1, head_dim=16), base)
