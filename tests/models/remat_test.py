"""Policies keep exactly the arrays they name, and change no number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.batch import Batch
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import LlamaConfig, init_params
from easylm_jax.models.remat import ALIASES, NAMES, POLICIES, parse_policy, tag
from easylm_jax.planner.remat import gradient, saved_arrays

B, T, D, N, K, H, F, L = 2, 24, 32, 4, 2, 10, 56, 2  # every width its own number
CONFIG = LlamaConfig(
    vocab_size=64,
    d_model=D,
    num_layers=L,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    d_ff=F,
    max_seq_len=T,
    attention=AttentionConfig(block_q=8, block_k=8),
)
ROWS = N // K * 8  # of a query tile: the heads of a group times block_q
SHAPES = {
    "input": (B, T, D),
    "q": (B, T, N * H),
    "k": (B, T, K * H),
    "v": (B, T, K * H),
    "o": (B, T, D),
    "gate": (B, T, F),
    "up": (B, T, F),
    "attention_out": (B, T // 8, K, ROWS, H),
    "attention_lse": (B, T // 8, K, ROWS),
}
# `down` is tagged and may be kept, but it only adds to the stream: no gradient reads it, and JAX
# stores nothing that is not read.
READ = ("q", "k", "v", "o", "gate", "up")
ATTENTION = ("attention_out", "attention_lse")
KEPT = {
    "full": (),
    "attention_only": ATTENTION,
    "linear_outputs": READ,
    "linear_outputs_and_attention": READ + ATTENTION,
    "checkpoint_dots_with_no_batch_dims": READ,
    "q:keep,down:keep": ("q",),
    "attention_lse:keep, gate:keep": ("attention_lse", "gate"),
}


def saved(policy, config=CONFIG):
    return saved_arrays(config, policy, batch=B, seq_len=T)


@pytest.mark.parametrize("policy", KEPT)
def test_a_layer_keeps_its_input_and_what_the_policy_names_and_nothing_else(policy):
    expected = [(name, SHAPES[name]) for name in ("input", *KEPT[policy])]
    assert sorted((s.name, s.shape) for s in saved(policy)) == sorted(expected)
    assert not any(s.on_host for s in saved(policy))


def test_without_remat_more_is_kept_than_under_any_policy():
    everything = sum(s.num_bytes for s in saved("none"))
    assert everything > 1.5 * sum(s.num_bytes for s in saved("linear_outputs_and_attention"))


def test_offloaded_arrays_are_kept_on_the_host():
    where = {s.name: s.on_host for s in saved("q:keep,gate:offload,attention_out:offload")}
    assert where == {"input": False, "q": False, "gate": True, "attention_out": True}


def test_attention_by_definition_keeps_no_matrix_of_scores():
    reference = dataclasses.replace(CONFIG, attention=AttentionConfig(implementation="reference"))
    shapes = {s.name: s.shape for s in saved("linear_outputs_and_attention", reference)}
    expected = {name: SHAPES[name] for name in ("input", *READ)}
    assert shapes == expected | {"attention_out": (B, T, N, H)}


@pytest.fixture(scope="module")
def plain():
    """Parameters, a packed batch, and loss and gradient without rematerialisation."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (B, T + 1), dtype=np.int32)
    segments = np.repeat([[1, 2, 0], [1, 2, 3]], [9, 11, 4], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(9), np.arange(11), np.arange(4)])[None].repeat(B, 0)
    weights = rng.uniform(0.5, 1.5, (B, T)).astype(np.float32) * (segments > 0)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions.astype(np.int32))
    make = jax.jit(functools.partial(init_params, CONFIG))
    params = jax.tree.map(lambda p: 5 * p, make(jax.random.key(0)))
    config = dataclasses.replace(CONFIG, remat="none")
    return params, batch, jax.jit(gradient(config))(params, batch)


@pytest.mark.parametrize(
    "change",
    [
        {"remat": "linear_outputs", "layer_unroll": L},
        {"remat": "q:keep,gate:offload,attention_out:offload"},  # the CPU has pinned host memory
        *(pytest.param({"remat": policy}, marks=pytest.mark.slow) for policy in POLICIES),
        pytest.param({"remat": "none", "layer_unroll": L}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_and_gradient_do_not_depend_on_policy_or_unrolling(plain, change):
    params, batch, (loss, grads) = plain
    got_loss, got_grads = jax.jit(gradient(dataclasses.replace(CONFIG, **change)))(params, batch)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-6)  # float32, summed in the same order
    for path, grad in jax.tree.leaves_with_path(grads):
        got = got_grads
        for key in path:
            got = got[key.key]
        scale = jnp.abs(grad).max()
        assert scale > 0, path
        np.testing.assert_allclose(got / scale, grad / scale, atol=1e-6, err_msg=str(path))


def test_easylm_names_mean_what_remat_py_says():
    assert parse_policy("everything_saveable") is None
    assert set(parse_policy("nothing_saveable").values()) == {"recompute"}
    for alias, kept in (
        ("checkpoint_dots_with_no_batch_dims", {*READ, "down"}),
        ("checkpoint_dots", {*READ, "down", *ATTENTION}),
    ):
        actions = parse_policy(alias)
        assert actions == {name: "keep" if name in kept else "recompute" for name in NAMES}
    assert not set(ALIASES) & set(POLICIES)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("linear_output", "near it: linear_outputs"),
        ("ful", "full"),
        ("q:keep,gates:keep", "'gates:keep' is not name:action .* gate, up"),
        ("q:store", "'q:store' .* keep, recompute, offload"),
        ("q:keep,", "'' is not name:action"),
        ("q,k:keep", "'q' is not name:action"),
        ("q:offload,q:keep", "'q:offload,q:keep' names q twice"),
    ],
)
def test_a_wrong_policy_is_named(spec, words):
    with pytest.raises(ValueError, match=words):
        parse_policy(spec)
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, remat=spec)


def test_a_tag_that_no_policy_knows_is_refused():
    with pytest.raises(AssertionError):
        tag(jnp.zeros(2), "gates")
