"""Adapters: nothing at first, exact gradients, none for the base; merged, split, cached."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easylm_jax.formats.foreign import abstract_params
from easylm_jax.mesh import make_mesh
from easylm_jax.models.decoding import init_cache, unstack_layers
from easylm_jax.models.llama import PARAM_RULES, Llama, make_forward, output_logits
from easylm_jax.models.lora import LoraConfig, combine, init_adapters, merge, target_shapes
from easylm_jax.models.presets import preset
from easylm_jax.models.quantized import quantize_base
from easylm_jax.objectives import cross_entropy
from easylm_jax.optim import OptimConfig, make_optimizer
from easylm_jax.sharding import to_global, tree_shardings
from easylm_jax.step import GuardConfig, train_step
from easylm_jax.train_state import init_state
from easylm_jax.tree import named_leaves, num_elements
from tests.tiny import REFERENCE, VOCAB, assert_close, tiny_batch, tiny_config, tiny_params

LORA = LoraConfig(rank=4, alpha=6.0)
CFG = tiny_config(attention=REFERENCE)  # which compiles faster
TARGETS = ("attention/q", "attention/k", "attention/v", "attention/o", "mlp/gate", "mlp/up")


def fresh(config=LORA, seed=0):
    return init_adapters(tiny_params(), config, jax.random.key(seed))


def trained(config=LORA, seed=0):
    """Adapters whose B is no longer zero."""
    keys = iter(jax.random.split(jax.random.key(seed + 1), 99))
    return jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), fresh(config))


def with_adapters(objective, config=LORA):
    """The objective of the adapters, `frozen` being the base."""
    return lambda params, frozen, batch, key: objective(
        combine(frozen, params, config), None, batch, key
    )


def loss_of(config, lora=LORA):
    objective = with_adapters(cross_entropy(make_forward(config)), lora)
    return lambda adapters, base, batch, key=None: objective(adapters, base, batch, key)["loss"][0]


@jax.jit
def logits_of(params, batch):
    return output_logits(params, make_forward(CFG)(params, batch, None)[0])


# ---- what there is -----------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_at_all():
    base, batch = tiny_params(), tiny_batch()
    combined = combine(base, fresh(), LORA)
    assert len(named_leaves(combined)) == len(named_leaves(base)) + 2 * 7
    expected = logits_of(base, batch)
    np.testing.assert_array_equal(logits_of(combined, batch), expected)
    other = combine(base, trained(), LORA)
    assert (logits_of(other, batch) != expected).mean() > 0.9


def test_a_is_uniform_within_one_over_root_in_and_nowhere_alike():
    rows = []
    shapes = abstract_params(tiny_config(d_model=256, d_ff=400, num_layers=3))
    for name, leaf in named_leaves(init_adapters(shapes, LORA, jax.random.key(0))).items():
        if name.endswith("lora_b"):
            assert not leaf.any()
            continue
        L, D, rank = leaf.shape
        assert (L, rank, leaf.dtype) == (3, 4, jnp.float32)
        unit = np.asarray(leaf) * np.sqrt(D)
        assert 0.98 < np.abs(unit).max() <= 1.0
        assert abs(unit.std() * np.sqrt(3) - 1) < 0.05  # of a uniform distribution
        rows += [layer.ravel()[:128] for layer in unit]
    assert len(rows) == 7 * 3 and np.abs(np.corrcoef(rows) - np.eye(21)).max() < 0.45


def test_targets_are_names_or_ends_of_paths_and_typos_are_told():
    stacked, apart = (abstract_params(tiny_config(scan_layers=s)) for s in (True, False))
    paths = target_shapes(stacked, LoraConfig(targets=("attention/.*", "up")))
    assert sorted(paths) == [f"layers/{n}" for n in sorted(TARGETS) if n != "mlp/gate"]
    assert sorted(target_shapes(apart, LoraConfig(targets=("layers_1/mlp/.*", "o")))) == [
        *("layers_0/attention/o", "layers_1/attention/o"),
        *("layers_1/mlp/down", "layers_1/mlp/gate", "layers_1/mlp/up"),
    ]
    with pytest.raises(ValueError, match=r"'gats' matches no linear layer; near it: gate"):
        target_shapes(stacked, LoraConfig(targets=("q", "gats")))


def test_adapters_are_split_as_their_kernels_are():
    shapes = abstract_params(preset("llama_7b"))
    make = functools.partial(init_adapters, shapes, LoraConfig(rank=8))
    adapters = jax.eval_shape(make, jax.random.key(0))
    assert num_elements(adapters) == 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    quantized = jax.eval_shape(lambda x: quantize_base(x, "nf4"), shapes)
    mesh = make_mesh("1,2,1,4")
    specs = {
        name: sharding.spec
        for tree in (adapters, quantized)
        for name, sharding in named_leaves(tree_shardings(tree, mesh, PARAM_RULES)).items()
    }
    for path, (into, out) in {
        "layers/attention/q": ("fsdp", "tensor"),
        "layers/attention/o": ("tensor", "fsdp"),
        "layers/mlp/up": ("fsdp", "tensor"),
        "layers/mlp/down": ("tensor", "fsdp"),
    }.items():
        assert specs[f"{path}/lora_a"] == P(None, into, None)
        assert specs[f"{path}/lora_b"] == specs[f"{path}/absmax"] == P(None, None, out)
        assert specs[f"{path}/nf4"] == P(None, into, out)


# ---- gradients and the step --------------------------------------------------------------------


def test_gradients_are_those_of_the_dense_kernel_by_the_chain_rule():
    """d A = scale * dW B^T and d B = scale * A^T dW, where dW is of the plain model's kernel."""
    lora, scale = LoraConfig(rank=4, alpha=6.0, rs_lora=True), 6.0 / 2
    assert LORA.scale == 6.0 / 4
    base, adapters, batch = tiny_params(), trained(), tiny_batch()
    loss, grads = jax.jit(jax.value_and_grad(loss_of(CFG, lora)))(adapters, base, batch)

    def product(path):
        layer = adapters["layers"][path[1]][path[2]]
        return scale * np.einsum("lir,lro->lio", *map(np.asarray, layer.values()))

    dense = jax.tree_util.tree_map_with_path(
        lambda path, w: w + product([k.key for k in path]) if w.ndim == 3 else w, base
    )
    objective = cross_entropy(make_forward(CFG))
    dense_loss, d_dense = jax.jit(
        jax.value_and_grad(lambda p: objective(p, None, batch, None)["loss"][0])
    )(dense)
    np.testing.assert_allclose(loss, dense_loss, rtol=1e-6)
    for part in ("attention", "mlp"):
        for name, layer in adapters["layers"][part].items():
            dw = np.asarray(d_dense["layers"][part][name]["kernel"], np.float64)
            a, b = (np.asarray(layer[x], np.float64) for x in ("lora_a", "lora_b"))
            expected = {
                "lora_a": scale * np.einsum("lio,lro->lir", dw, b),
                "lora_b": scale * np.einsum("lir,lio->lro", a, dw),
            }
            assert_close(grads["layers"][part][name], expected, rtol=1e-5)


def test_no_weight_gradient_of_the_base_is_computed():
    """By the count of multiplications: forward and dx are two thirds of a full backward pass."""
    cfg = replace(CFG, d_model=128, d_ff=256, scan_layers=False)
    shapes = abstract_params(cfg)
    lora = LoraConfig(rank=1)
    adapters = jax.eval_shape(lambda k: init_adapters(shapes, lora, k), jax.random.key(0))
    batch = tiny_batch(rows=8, length=64)

    def flops(argnums):
        grad = jax.jit(jax.grad(loss_of(cfg, lora), argnums=argnums))
        return grad.lower(adapters, shapes, batch).compile().cost_analysis()["flops"]

    kernels = sum(x.size for n, x in named_leaves(shapes).items() if "layers" in n and x.ndim == 2)
    saved = 2 * batch.tokens.size * kernels
    assert flops((0, 1)) - flops(0) > 0.95 * saved


def test_training_keeps_optimiser_state_for_adapters_alone_and_learns():
    optimizer = make_optimizer(OptimConfig(weight_decay=0.0), lambda step: 0.02)
    base, batch = quantize_base(tiny_params(), "nf4"), tiny_batch()
    state = init_state(lambda key: init_adapters(tiny_params(), LORA, key), optimizer, 0)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * num_elements(state.params)
    step = jax.jit(
        functools.partial(
            train_step,
            objective=with_adapters(cross_entropy(make_forward(CFG))),
            optimizer=optimizer,
            num_micro_batches=2,
            guard=GuardConfig(),
        )
    )
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch, frozen=base)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5 and losses == sorted(losses, reverse=True)


# ---- the same model in other forms -------------------------------------------------------------


@pytest.mark.parametrize("how", ["full", "nf4"])
def test_merged_equals_unmerged(how):
    config = LoraConfig(rank=4, alpha=6.0, base=how, targets=("q", "up", "down"))
    base, adapters, batch = tiny_params(), trained(config), tiny_batch()
    trained_on = base if how == "full" else quantize_base(base, how)
    expected = logits_of(combine(trained_on, adapters, config), batch)
    merged = merge(base, adapters, config, jnp.float32)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert_close(logits_of(merged, batch), expected, rtol=1e-5)
    if how != "full":
        plain = LoraConfig(rank=4, alpha=6.0)
        other = merge(base, adapters, plain, jnp.float32)  # on what it was not fitted to
        assert np.abs(logits_of(other, batch) - expected).max() > 1e-2
        with pytest.raises(ValueError, match=rf"merging into a quantised kernel \(.*/{how}\)"):
            merge(trained_on, adapters, config, jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_rounds_once(dtype):
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params())
    merged = merge(base, trained(), LORA, dtype)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
    adapter = trained()["layers"]["mlp"]["up"]
    a, b, kernel = adapter["lora_a"], adapter["lora_b"], base["layers"]["mlp"]["up"]["kernel"]
    exact = np.float64(kernel) + 1.5 * np.einsum("lir,lro->lio", np.float64(a), np.float64(b))
    got = merged["layers"]["mlp"]["up"]["kernel"]
    if dtype == "float32":
        assert_close(got, exact, rtol=1e-6)
    else:
        assert (got == exact.astype(dtype)).mean() > 0.999


@pytest.mark.parametrize("how", ["full", "nf4"])
def test_stacked_or_not_is_the_same_and_so_is_decoding_from_a_cache(how):
    base = tiny_params() if how == "full" else quantize_base(tiny_params(), how)
    combined, cfg = combine(base, trained(), LORA), CFG
    apart = unstack_layers(jax.tree.map(jnp.copy, combined))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, size=(2, 8)), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(8)[None], (2, 8))

    def run(params, config, piece, cache=None):
        model = Llama(config)
        ids = (tokens[:, piece], jnp.ones_like(tokens[:, piece]), places[:, piece])
        hidden, cache = jax.jit(model.apply)({"params": params}, *ids, cache=cache)
        return output_logits(params, hidden), cache

    expected, _ = run(combined, cfg, slice(0, 8))
    for params, config in ((combined, cfg), (apart, replace(CFG, scan_layers=False))):
        assert_close(run(params, config, slice(0, 8))[0], expected, rtol=2e-6)
        cache, seen = init_cache(config, 2, 8), []
        for piece in (slice(0, 6), slice(6, 7), slice(7, 8)):
            logits, cache = run(params, config, piece, cache)
            seen.append(logits)
        assert_close(jnp.concatenate(seen, axis=1), expected, rtol=2e-6)


def test_a_mesh_of_eight_devices_gives_the_same_loss_and_gradients():
    base, adapters, mesh = quantize_base(tiny_params(), "nf4"), trained(), make_mesh("1,2,2,2")
    batch = tiny_batch(rows=8)
    loss = jax.value_and_grad(loss_of(CFG))
    expected = jax.jit(loss)(adapters, base, batch)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, tree_shardings(x, mesh, PARAM_RULES)) for x in (adapters, base)]
        codes = placed[1]["layers"]["mlp"]["down"]["nf4"]
        assert codes.addressable_shards[0].data.shape == (2, 48 // 2, 32 // 2)
        rows = to_global(jax.tree.map(np.asarray, batch), mesh, 8)
        assert_close(jax.jit(loss)(*placed, rows), expected, rtol=1e-5)


# ---- dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dropout_is_on_the_input_of_each_a_by_itself_and_in_training_alone(scan_layers):
    """A single token's gradient of A is an outer product; its rows are zero where x was dropped."""
    rate, D = 0.4, 512
    cfg = replace(CFG, d_model=D, scan_layers=scan_layers, remat="linear_outputs")
    cfg = replace(cfg, lora_dropout=rate)
    assert cfg.has_dropout
    base = jax.jit(Llama(cfg).init)(jax.random.key(0), *[jnp.ones((1, 1), jnp.int32)] * 3)["params"]
    adapters = init_adapters(base, LORA, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    batch = jax.tree.map(lambda x: jnp.ones_like(x[:1, :1]), tiny_batch())

    grads = jax.jit(jax.grad(loss_of(cfg)))

    def dropped(key):
        """[4, D]: `gate` and `up` of both layers."""
        d = grads(adapters, base, batch, key)
        d = d if scan_layers else {"layers": jax.tree.map(lambda *x: jnp.stack(x), *d.values())}
        rows = [np.asarray(d["layers"]["mlp"][name]["lora_a"]) == 0 for name in ("gate", "up")]
        return np.concatenate(rows).all(-1)

    zeros = dropped(jax.random.key(0))
    np.testing.assert_allclose(zeros.mean(-1), rate, atol=0.09)  # 4 std of 512 draws
    assert np.abs(np.corrcoef(zeros) - np.eye(4)).max() < 0.2
    assert (zeros != dropped(jax.random.key(1))).any() and not dropped(None).any()
