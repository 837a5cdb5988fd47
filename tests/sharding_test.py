"""Which axes split which leaf, for every preset; batches on the mesh; and what the errors tell."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easylm_jax.batch import Batch
from easylm_jax.mesh import make_mesh
from easylm_jax.models.llama import PARAM_RULES, init_params
from easylm_jax.models.presets import PRESETS, preset
from easylm_jax.optim import OPTIMIZERS, OptimConfig, make_optimizer
from easylm_jax.sharding import (
    constrain,
    local_rows,
    sharding_table,
    spec_for,
    to_global,
    tree_shardings,
)
from easylm_jax.train_state import init_state
from easylm_jax.tree import matches, named_leaves

GOLDEN = Path(__file__).parent / "golden" / "sharding_debug.txt"

# Every parameter by its full path: what splits it. Layers first, then in, then out.
INTENDED = {
    "embed/embedding": P("tensor", "fsdp"),
    "final_norm/scale": P(None),
    "layers/attention/k/bias": P(None, "tensor"),
    "layers/attention/k/kernel": P(None, "fsdp", "tensor"),
    "layers/attention/o/kernel": P(None, "tensor", "fsdp"),
    "layers/attention/q/bias": P(None, "tensor"),
    "layers/attention/q/kernel": P(None, "fsdp", "tensor"),
    "layers/attention/v/bias": P(None, "tensor"),
    "layers/attention/v/kernel": P(None, "fsdp", "tensor"),
    "layers/attention_norm/scale": P(None, None),
    "layers/mlp/down/kernel": P(None, "tensor", "fsdp"),
    "layers/mlp/gate/kernel": P(None, "fsdp", "tensor"),
    "layers/mlp/up/kernel": P(None, "fsdp", "tensor"),
    "layers/mlp_norm/scale": P(None, None),
    "lm_head/kernel": P("fsdp", "tensor"),
}


@functools.cache
def state_shapes(name: str, optimizer: str = "adamw"):
    optimizer = make_optimizer(OptimConfig(name=optimizer), lambda step: 0.1)
    cfg = preset(name)
    make_params = functools.partial(init_params, cfg)
    return jax.eval_shape(functools.partial(init_state, make_params, optimizer, 0))


@pytest.mark.parametrize("name", PRESETS)
def test_every_leaf_of_every_preset_is_split_as_intended(name):
    """Parameters and Adam moments by the same table, nothing else by any rule but replication."""
    state, mesh = state_shapes(name), make_mesh("1,4,1,1", jax.devices()[:4])
    seen = []
    for path, sharding in named_leaves(tree_shardings(state, mesh, PARAM_RULES)).items():
        owners = [known for known in INTENDED if path.endswith("/" + known)]
        assert sharding.spec == (INTENDED[owners[0]] if owners else P()), path
        assert owners or named_leaves(state)[path].size == 1, path
        seen += owners
    params = named_leaves(state.params)
    assert sorted(seen) == sorted([*params] * 3)  # the parameter and two moments


def test_every_parameter_matches_exactly_one_rule():
    for path in INTENDED:
        assert sum(matches(pattern, path) for pattern, _ in PARAM_RULES) == 1, path


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_an_optimiser_replicates_is_small(optimizer):
    state = state_shapes("small", optimizer)
    mesh = make_mesh("1,8,1,1")
    shardings = tree_shardings(state.opt_state, mesh, PARAM_RULES)
    pairs = zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(shardings), strict=True)
    whole = sum(leaf.size for leaf, sharding in pairs if sharding.is_fully_replicated)
    assert whole < 0.02 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_table_of_the_debug_model_equals_the_golden_one():
    """`EASYLM_UPDATE_GOLDEN=1 pytest tests/sharding_test.py` writes it anew; read the diff."""
    table = sharding_table(state_shapes("debug"), make_mesh("1,2,2,2"), PARAM_RULES)
    table = "".join(line.rstrip() + "\n" for line in table.splitlines())
    if os.environ.get("EASYLM_UPDATE_GOLDEN"):
        GOLDEN.write_text(table)
    assert table == GOLDEN.read_text()


def test_errors_name_parameter_dim_axis_and_what_fits():
    shapes = {"layers": {"q": {"kernel": jax.ShapeDtypeStruct((2, 12, 16), jnp.float32)}}}
    with pytest.raises(
        ValueError,
        match=r"layers/q/kernel has size 12 in dim 1, .* axis fsdp = 8 .*4 left.* 6 would",
    ):
        tree_shardings(shapes, make_mesh("1,8,1,1"), PARAM_RULES)
    with pytest.raises(ValueError, match=r"no sharding rule .* adapter/a of shape \(3, 4\)"):
        spec_for("adapter/a", (3, 4), PARAM_RULES)
    assert spec_for("anything/count", (), PARAM_RULES) == P()


@pytest.mark.parametrize("spec", ["2,2,1,2", "1,2,4,1", "8,1,1,1", "1,1,1,8"])
def test_local_rows_become_the_batch_again(spec):
    mesh, rng = make_mesh(spec), np.random.default_rng(0)
    B, T = 16, 8
    batch = Batch(*(rng.integers(0, 99, size=(B, T)) for _ in range(5)))
    batch = batch.replace(per_token={"old_logp": rng.normal(size=(B, T))})
    rows = local_rows(mesh, B)
    assert rows == list(range(B))  # one process holds them all
    placed = to_global(jax.tree.map(lambda x: x[rows], batch), mesh, B)
    ways = mesh.shape["replica"] * mesh.shape["fsdp"], mesh.shape["sequence"]
    for array, expected in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(array, jnp.asarray(expected))
        shapes = {shard.data.shape for shard in array.addressable_shards}
        assert shapes == {(B // ways[0], T // ways[1])}


def test_constrain_acts_inside_a_mesh_and_not_outside():
    x = jnp.arange(32.0).reshape(8, 4)
    assert constrain(x, "fsdp", None) is x
    with jax.set_mesh(make_mesh("1,8,1,1")):
        split = jax.jit(lambda x: constrain(x, "fsdp", None))(x)
    assert split.sharding.spec[0] == "fsdp"
    np.testing.assert_array_equal(split, x)
