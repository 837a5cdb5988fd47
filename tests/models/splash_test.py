"""Splash attention: its program run step by step on CPU, and compiled for a TPU not at hand."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies

from easylm_jax.mesh import make_mesh
from easylm_jax.models.attention import AttentionConfig, attention
from easylm_jax.models.attention_mesh import on_each_device
from easylm_jax.models.llama import PARAM_RULES, init_params, make_forward
from easylm_jax.models.remat import jax_policy, parse_policy
from easylm_jax.models.splash import splash
from easylm_jax.objectives import cross_entropy
from easylm_jax.step import GuardConfig, jit_train_step
from easylm_jax.train_state import abstract_state, init_state
from tests.models.attention_test import REFERENCE, draw, random_like, value_and_grads
from tests.tiny import assert_close, tiny_batch, tiny_config

SPLASH = AttentionConfig(implementation="splash", block_q=128, block_k=128)
interpreted = functools.partial(splash, block_q=128, block_k=128, window=None, interpret=True)
windowed = functools.partial(interpreted, window=40)
IDS = ("q_segments", "k_segments", "q_positions", "k_positions")


@functools.partial(jax.jit, static_argnames=("run",))
def splash_and_grads(arrays, where, d_out, *, run):
    ids = [where[name] for name in IDS]
    out, vjp = jax.vjp(lambda arrays: run(*arrays, *ids, 0, None), arrays)
    return out, vjp(d_out)[0]


@pytest.mark.parametrize("window", [None, 40])
def test_splash_equals_the_reference_forward_and_backward(window):
    """Two tiles, the last one padded; documents of about 50 tokens, forgotten keys."""
    arrays, where = draw(1, 200, starts=0.02)
    d_out = random_like(arrays[0])
    config = dataclasses.replace(REFERENCE, sliding_window=window)
    run = interpreted if window is None else windowed
    got = splash_and_grads(arrays, where, d_out, run=run)
    assert_close(got, value_and_grads(arrays, where, d_out, config=config), rtol=2e-6)


@pytest.mark.parametrize("window", [None, 40])
def test_what_sees_nothing_is_exactly_zero(window):
    """Padding; a document without keys; with a window also queries whose near keys are gone."""
    arrays, where = draw(18, 200, starts=0.02)
    rows = np.arange(200)
    gone = (where["q_segments"] == 2) | ((rows > 20) & (rows < 80))[None]
    where["k_segments"] = jnp.where(gone, -1, where["k_segments"])
    run = interpreted if window is None else windowed
    out, (d_q, d_k, d_v) = splash_and_grads(arrays, where, random_like(arrays[0]), run=run)
    config = dataclasses.replace(REFERENCE, sliding_window=window)
    blind = (value_and_grads(arrays, where, d_q, config=config)[0] == 0).all((2, 3))
    unseen = where["k_segments"] <= 0
    assert blind.sum() > 66 and (~blind).sum() > 100
    for array, rows in ((out, blind), (d_q, blind), (d_k, unseen), (d_v, unseen)):
        assert (array[rows] == 0).all() and (array[~rows] != 0).any()


def test_nothing_leaks_out_of_a_document():
    """Another token in one document changes no bit of another's output and gradients."""
    arrays, where = draw(5, 200, starts=0.02)
    d_out = random_like(arrays[0])
    inside = where["q_segments"] == 2
    changed = [jnp.where(inside[..., None, None], 3 * random_like(x), x) for x in arrays]
    before, after = (splash_and_grads(x, where, d_out, run=interpreted) for x in (arrays, changed))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (a[~inside] == b[~inside]).all() and (a[inside] != b[inside]).any()


@pytest.mark.parametrize("across", ["gather", "all_to_all"])
def test_a_row_split_over_devices_equals_the_whole(across):
    """Four parts of 100 tokens, each padded to a tile of its own where queries are split."""
    arrays, where = draw(7, 400, N=8, K=4, B=1, starts=0.02)
    d_out = random_like(arrays[0])
    config = dataclasses.replace(REFERENCE, sliding_window=150)
    run = functools.partial(interpreted, window=150)

    def on_mesh(q, k, v, *rest):
        ids, start, key = rest[:4], *rest[4:]
        return on_each_device(run, q, k, v, ids, start, key, across=across)

    with jax.set_mesh(make_mesh("1,1,4,1", jax.devices()[:4])):
        got = splash_and_grads(arrays, where, d_out, run=on_mesh)
    assert_close(got, value_and_grads(arrays, where, d_out, config=config), rtol=2e-6)


# ---- compiled for a TPU that is not here ---------------------------------------------------------


@pytest.fixture
def v5e(monkeypatch):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }.items():
        monkeypatch.setenv(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def compiled_for(devices, mesh: str, config: AttentionConfig, *, remat: str = "none") -> str:
    """The program of attention and its gradients, with 4 query heads on 2 of 64 numbers."""
    actions = parse_policy(remat)

    def value_and_grads(arrays, where):
        def run(arrays):
            out = attention(*arrays, **where, config=config)
            return jnp.square(out.astype(jnp.float32)).sum()

        wrapped = run if actions is None else jax.checkpoint(run, policy=jax_policy(actions))
        return jax.value_and_grad(wrapped)(arrays)

    with jax.set_mesh(make_mesh(mesh, devices)):
        heads = [jax.ShapeDtypeStruct((4, 512, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
        where = dict.fromkeys(IDS, jax.ShapeDtypeStruct((4, 512), jnp.int32))
        return jax.jit(value_and_grads).lower(heads, where).compile().as_text()


@pytest.mark.parametrize(
    "mesh, across", [("1,2,2,1", "gather"), ("1,2,2,1", "all_to_all"), ("1,2,1,2", "gather")]
)
def test_splash_compiles_for_v5e(v5e, mesh, across):
    config = dataclasses.replace(SPLASH, across_sequence=across, sliding_window=200)
    program = compiled_for(v5e, mesh, config)
    assert all(f"splash_mha_{name}" in program for name in ("fwd", "dq", "dkv"))
    assert ("all-to-all" in program) == (across == "all_to_all")


@pytest.mark.parametrize("policy, forwards", [("full", 2), ("attention_only", 1)])
def test_remat_keeps_what_the_backward_pass_reads(v5e, policy, forwards):
    """The forward kernel runs again in the backward pass unless a policy keeps its output."""
    program = compiled_for(v5e, "1,4,1,1", SPLASH, remat=policy)
    kernels = re.findall(r"%splash_mha_(\w+?)_\w+(?:\.\d+)? = .* custom-call\(", program)
    assert sorted(kernels) == ["dkv", "dq"] + ["fwd"] * forwards


@pytest.mark.slow
def test_the_training_step_of_a_model_compiles_for_v5e(v5e):
    model = tiny_config(head_dim=64, attention=SPLASH, remat="attention_only", dtype="bfloat16")
    optimizer = optax.sgd(0.1)
    mesh = make_mesh("1,2,1,2", v5e)
    with jax.set_mesh(mesh):
        make = functools.partial(
            init_state, functools.partial(init_params, model), optimizer, seed=0
        )
        state = abstract_state(make, mesh, PARAM_RULES)
        step = jit_train_step(
            shardings=jax.tree.map(lambda x: x.sharding, state),
            objective=cross_entropy(make_forward(model)),
            optimizer=optimizer,
            num_micro_batches=2,
            guard=GuardConfig(),
        )
        batch = jax.eval_shape(lambda: tiny_batch(rows=4, length=256))
        program = step.lower(state, batch).compile().as_text()
    assert len(re.findall(r"%splash_mha_fwd\S* = .* custom-call\(", program)) == 1


def test_splash_off_a_tpu_is_refused():
    arrays, where = draw(1, 128)
    with pytest.raises(ValueError, match="'splash' runs on TPUs, but this program is for cpu; set"):
        attention(*arrays, **where, config=SPLASH)
