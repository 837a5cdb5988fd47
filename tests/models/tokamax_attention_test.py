"""The Tokamax adapter: its masks, on CPU, through Tokamax's implementation for XLA."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from easylm_jax.mesh import make_mesh
from easylm_jax.models.attention import AttentionConfig, attention
from easylm_jax.models.attention_mesh import on_each_device
from easylm_jax.models.tokamax_attention import tokamax_attention
from tests.models.attention_test import REFERENCE, draw, random_like, value_and_grads
from tests.models.splash_test import splash_and_grads as run_with_grads
from tests.tiny import assert_close

on_xla = functools.partial(tokamax_attention, kernel="xla", window=None)
TOKAMAX = AttentionConfig(implementation="tokamax")


@pytest.fixture
def installed(monkeypatch):
    pytest.importorskip("tokamax")
    monkeypatch.setattr(sys, "argv", ["pytest"])  # tokamax reads its own flags there
    with jax.numpy_rank_promotion("allow"):
        yield


def remembered(*args, **options):
    """As `draw`, without forgotten keys."""
    arrays, where = draw(*args, **options)
    return arrays, where | {"k_segments": where["q_segments"]}


@pytest.mark.parametrize("window", [None, 20])
def test_tokamax_equals_the_reference_forward_and_backward(installed, window):
    """Documents and the window as ranges of keys; padding is exactly zero."""
    arrays, where = remembered(1, 200, starts=0.03)
    d_out = random_like(arrays[0])
    run = functools.partial(on_xla, window=window)
    out, grads = got = run_with_grads(arrays, where, d_out, run=run)
    config = dataclasses.replace(REFERENCE, sliding_window=window)
    assert_close(got, value_and_grads(arrays, where, d_out, config=config), rtol=2e-6)
    padding = where["q_segments"] == 0
    assert padding.any() and all((x[padding] == 0).all() for x in (out, *grads))


def test_nothing_leaks_out_of_a_document(installed):
    arrays, where = remembered(2, 100, starts=0.05)
    d_out = random_like(arrays[0])
    inside = where["q_segments"] == 2
    changed = [jnp.where(inside[..., None, None], 3 * random_like(x), x) for x in arrays]
    before, after = (run_with_grads(x, where, d_out, run=on_xla) for x in (arrays, changed))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (a[~inside] == b[~inside]).all() and (a[inside] != b[inside]).any()


@pytest.mark.parametrize("across", ["gather", "all_to_all"])
def test_a_row_split_over_devices_equals_the_whole(installed, across):
    arrays, where = remembered(3, 100, N=8, K=4, B=1, starts=0.05)
    d_out = random_like(arrays[0])

    def on_mesh(q, k, v, *rest):
        return on_each_device(on_xla, q, k, v, rest[:4], *rest[4:], across=across)

    with jax.set_mesh(make_mesh("1,1,4,1", jax.devices()[:4])):
        got = run_with_grads(arrays, where, d_out, run=on_mesh)
    assert_close(got, value_and_grads(arrays, where, d_out, config=REFERENCE), rtol=2e-6)


def test_the_kernel_for_hopper_is_asked_for_by_name_and_nothing_runs_in_its_place(installed):
    arrays, where = remembered(4, 64)
    with pytest.raises(ValueError, match="kernel 'mosaic_gpu' cannot compute this: .* Hopper GPU"):
        tokamax_attention(*arrays, *where.values(), 0, None, window=None)


def test_tokamax_that_is_not_there_or_off_a_gpu_is_refused(monkeypatch):
    arrays, where = remembered(4, 64)
    with pytest.raises(ValueError, match="'tokamax' runs on GPUs, but this program is for cpu;"):
        attention(*arrays, **where, config=TOKAMAX)
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.attention", None)
    with pytest.raises(ValueError, match="needs the package tokamax .* install the extra 'hopper'"):
        on_xla(*arrays, *where.values(), 0, None)
