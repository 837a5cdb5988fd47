"""One step: the same gradient on every mesh and under accumulation, the guard, metrics, dropout.

Gradients are compared, not Adam's updates: Adam divides by their size and so turns rounding noise
of near-zero gradients into full steps.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easylm_jax.mesh import make_mesh
from easylm_jax.models.llama import PARAM_RULES, init_params, make_forward
from easylm_jax.objectives import cross_entropy
from easylm_jax.optim import OptimConfig, make_optimizer
from easylm_jax.planner.collectives import collectives
from easylm_jax.sharding import to_global, tree_shardings
from easylm_jax.step import GuardConfig, train_step
from easylm_jax.train_state import init_state
from tests.tiny import BLOCKS, assert_close, tiny_batch, tiny_config, tiny_params

RATE = 0.5
OBJECTIVE = cross_entropy(make_forward(tiny_config()))


def gradient_recorder() -> optax.GradientTransformation:
    """Plain gradient descent whose state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params: (jax.tree.map(lambda g: -RATE * g, grads), grads),
    )


def new_state(optimizer, seed: int = 0):
    return init_state(lambda key: tiny_params(), optimizer, seed)


def uneven_batch():
    """32 packed and padded rows; the weights of some rows are all 0, of others tiny or large."""
    batch = tiny_batch(7, rows=32, length=16)
    scale = np.random.default_rng(0).choice([0.0, 0.01, 1.0, 30.0], size=(32, 1))
    return batch.replace(weights=batch.weights * jnp.asarray(scale, jnp.float32))


def run(optimizer, state, batch, *, guard=None, objective=OBJECTIVE, **options):
    options = dict(num_micro_batches=1, has_dropout=False) | options
    step = functools.partial(
        train_step,
        objective=objective,
        optimizer=optimizer,
        guard=guard or GuardConfig(),
        **options,
    )
    return jax.jit(step)(state, batch)


# ---- meshes and accumulation -------------------------------------------------------------------


@functools.cache
def on_one_device():
    optimizer = gradient_recorder()
    return run(optimizer, new_state(optimizer), uneven_batch())


def on_mesh(spec: str, optimizer, num_micro_batches: int, **options):
    """The step as `train.py` runs it: state and batch placed by the rules, mesh set."""
    mesh = make_mesh(spec)
    batch = to_global(jax.tree.map(np.asarray, uneven_batch()), mesh, 32)
    with jax.set_mesh(mesh):
        state = new_state(optimizer)
        state = jax.device_put(state, tree_shardings(state, mesh, PARAM_RULES))
        return run(optimizer, state, batch, num_micro_batches=num_micro_batches, **options)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "spec, num_micro_batches",
    [
        slow("8,1,1,1", 1),
        slow("8,1,1,1", 4),
        slow("1,8,1,1", 1),
        slow("1,8,1,1", 4),
        slow("2,2,1,2", 1),
        slow("2,2,1,2", 4),
        slow("1,2,2,2", 1),
        ("1,2,2,2", 4),
    ],
)
def test_loss_gradients_and_update_do_not_depend_on_the_mesh(spec, num_micro_batches):
    expected, expected_metrics = on_one_device()
    state, metrics = on_mesh(spec, gradient_recorder(), num_micro_batches)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-6, err_msg=name)
    assert_close(state.opt_state, expected.opt_state, rtol=1e-5)  # the gradients
    start = tiny_params()
    changes = [
        jax.tree.map(lambda a, b: np.asarray(a) - b, s.params, start) for s in (state, expected)
    ]
    assert_close(*changes, rtol=1e-5)


@pytest.mark.slow
def test_accumulation_changes_nothing_on_one_device():
    optimizer = gradient_recorder()
    state, metrics = run(optimizer, new_state(optimizer), uneven_batch(), num_micro_batches=4)
    expected, expected_metrics = on_one_device()
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    assert_close(state.opt_state, expected.opt_state, rtol=2e-6)


def test_parameters_and_adam_moments_are_really_split():
    mesh, optimizer = make_mesh("1,4,1,2"), make_optimizer(OptimConfig(), lambda step: 0.1)
    state = new_state(optimizer)
    state = jax.device_put(state, tree_shardings(state, mesh, PARAM_RULES))
    adam = state.opt_state[1][0]
    for tree in (state.params, adam.mu, adam.nu):
        head, down = tree["lm_head"]["kernel"], tree["layers"]["mlp"]["down"]["kernel"]
        assert {s.data.shape for s in head.addressable_shards} == {(32 // 4, 64 // 2)}
        assert {s.data.shape for s in down.addressable_shards} == {(2, 48 // 2, 32 // 4)}
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        assert held < total / 8 + 4 * 5 * 32  # and the five norms


# ---- metrics -----------------------------------------------------------------------------------


def test_metrics_are_weighted_means_and_the_norm_of_the_mean_gradient():
    state, metrics = on_one_device()
    batch = uneven_batch()
    sums = jax.jit(OBJECTIVE)(tiny_params(), None, batch, None)
    weight = np.asarray(batch.weights, np.float64).sum()
    np.testing.assert_allclose(metrics["loss_weight"], weight, rtol=1e-6)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(metrics[name], float(sums[name][0]) / weight, rtol=1e-6)
    norm = np.sqrt(
        sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(state.opt_state))
    )
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    assert metrics["skipped"] == 0 and state.step == 1


# ---- on a toy objective: the guard, the keys ---------------------------------------------------


def toy_objective(params, frozen, batch, rng):
    """Loss w * mean weight; the batch says what w's loss and gradient are, NaN included."""
    del frozen, rng
    return {"loss": ((params["w"] * batch.weights).sum(), jnp.float32(batch.weights.size))}


def toy_batch(value: float):
    return tiny_batch(rows=1, length=8).replace(weights=jnp.full((1, 8), value))


@functools.cache
def toy_step(guard: GuardConfig):
    optimizer = make_optimizer(OptimConfig(), lambda step: 1e-9)  # hardly moves w = 1
    step = functools.partial(
        train_step, objective=toy_objective, optimizer=optimizer, num_micro_batches=1, guard=guard
    )
    return init_state(lambda key: {"w": jnp.ones((1, 1))}, optimizer, 0), jax.jit(step)


def assert_same_bits(a, b):
    a, b = (jax.tree.map(np.asarray, (s.params, s.opt_state)) for s in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("on_bad_loss", ["skip", "stop"])
def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(bad, on_bad_loss):
    state, step = toy_step(GuardConfig(on_bad_loss=on_bad_loss))
    before, _ = step(state, toy_batch(1.0))
    after, metrics = step(before, toy_batch(bad))
    assert_same_bits(after, before)
    assert metrics["skipped"] == 1 and after.step == before.step + 1 == 2
    assert after.trend.count == before.trend.count == 1
    again, metrics = step(after, toy_batch(1.0))
    assert metrics["skipped"] == 0 and np.isfinite(again.params["w"]).all()


def test_ignore_makes_the_update_all_the_same():
    state, step = toy_step(GuardConfig(on_bad_loss="ignore"))
    after, metrics = step(state, toy_batch(np.nan))
    assert np.isnan(after.params["w"]).all() and metrics["skipped"] == 0


def test_a_spike_is_a_loss_n_deviations_above_the_running_mean():
    """After the warm-up; a fall of any depth is welcome."""
    guard = GuardConfig(spike_deviations=4.0, warmup_steps=6, decay=0.9)
    state, step = toy_step(guard)
    losses = np.array([2.0, 1.0, 90.0, 1.5, 1.0, 2.0, 1.0, 1.5, 2.0, 1.0, 2.0, 1.5])
    mean = variance = 0.0
    for count, loss in enumerate(losses):
        state, metrics = step(state, toy_batch(loss))
        assert metrics["skipped"] == 0
        rate = max(1 / (count + 1), 0.1)
        new = mean + rate * (loss - mean)
        variance = (1 - rate) * variance + rate * (loss - mean) * (loss - new)  # Welford
        mean = new
    np.testing.assert_allclose(
        (state.trend.mean, state.trend.variance), (mean, variance), rtol=1e-5
    )
    limit = mean + 4 * np.sqrt(variance)
    for loss, skipped in ((limit * 1.001, 1), (limit * 0.999, 0), (-100.0, 0)):
        after, metrics = step(state, toy_batch(loss))
        assert metrics["skipped"] == skipped, loss
        assert after.trend.count == state.trend.count + 1 - skipped
    after, _ = step(state, toy_batch(limit * 1.001))
    assert_same_bits(after, state)


def test_the_norm_of_bfloat16_gradients_is_float32():
    factor = jax.random.normal(jax.random.key(0), (300, 300)).astype(jnp.bfloat16)

    def objective(params, frozen, batch, rng):
        product = (params["w"] * factor).astype(jnp.float32).sum()
        return {"loss": (product, jnp.float32(1.0))}

    optimizer = make_optimizer(OptimConfig(), lambda step: 0.1)
    state = init_state(lambda key: {"w": jnp.ones((300, 300), jnp.bfloat16)}, optimizer, 0)
    options = dict(objective=objective, optimizer=optimizer, guard=GuardConfig())
    state, metrics = train_step(state, toy_batch(1.0), num_micro_batches=1, **options)
    expected = np.linalg.norm(np.asarray(factor, np.float64))
    np.testing.assert_allclose(float(metrics["grad_norm"]), expected, rtol=1e-5)
    assert state.params["w"].dtype == jnp.bfloat16


def test_an_unknown_reaction_is_refused():
    with pytest.raises(
        ValueError, match="guard.on_bad_loss is 'halt'; it can be ignore, skip, stop"
    ):
        GuardConfig(on_bad_loss="halt")


def test_the_key_differs_between_steps_and_micro_batches_and_repeats_with_the_seed():
    def key_objective(params, frozen, batch, rng):
        """The loss is a number drawn from the key; its square tells micro-batches apart."""
        del frozen, batch
        drawn, one = jax.random.uniform(rng), jnp.float32(1)
        return {"loss": (params["w"].sum() * 0 + drawn, one), "square": (drawn**2, one)}

    optimizer, batch = gradient_recorder(), tiny_batch(rows=2)
    step = functools.partial(
        train_step,
        objective=key_objective,
        optimizer=optimizer,
        num_micro_batches=2,
        guard=GuardConfig(),
    )
    step = jax.jit(step)

    def losses(seed):
        state = init_state(lambda key: {"w": jnp.ones((1, 1))}, optimizer, seed)
        for _ in range(3):
            state, metrics = step(state, batch)
            assert metrics["square"] - metrics["loss"] ** 2 > 1e-5  # the variance of two draws
            yield float(metrics["loss"])

    first = [*losses(0)]
    assert first == [*losses(0)] and len({*first, *losses(1)}) == 6


@pytest.mark.slow
def test_dropout_draws_the_same_with_replicas_in_micro_batches():
    config = tiny_config(residual_dropout=(0.3, 0.3))
    options = dict(objective=cross_entropy(make_forward(config)), has_dropout=True)
    states = [on_mesh(s, gradient_recorder(), 2, **options)[0] for s in ("1,8,1,1", "2,4,1,1")]
    assert_close(*(state.opt_state for state in states), rtol=1e-5)  # the gradients


def what_a_step_sends(axes: str, config, batch, **options):
    """The collectives of a compiled training step on the mesh `axes`."""
    devices = jax.devices()[: math.prod(map(int, axes.split(",")))]
    mesh, optimizer, rows = make_mesh(axes, devices), optax.sgd(RATE), batch.tokens.shape[0]
    options = dict(num_micro_batches=1, has_dropout=False) | options
    with jax.set_mesh(mesh):
        state = init_state(functools.partial(init_params, config), optimizer, 0)
        state = jax.device_put(state, tree_shardings(state, mesh, PARAM_RULES))
        objective = cross_entropy(make_forward(config))
        options |= dict(objective=objective, optimizer=optimizer, guard=GuardConfig())
        step = jax.jit(functools.partial(train_step, **options))
        batch = to_global(jax.tree.map(np.asarray, batch), mesh, rows)
        text = step.lower(state, batch).compile().as_text()
    return collectives(text, mesh.shape)


def test_replicas_meet_once_a_step_and_not_in_every_micro_batch():
    """Read off the compiled program: what crosses from replica to replica is outside all loops."""
    found = what_a_step_sends("2,4,1,1", tiny_config(), uneven_batch(), num_micro_batches=4)
    times = [{c.times for c in found if (axis in c.axes)} for axis in ("replica", "fsdp")]
    assert times[0] == {1} and max(times[1]) >= 4, found


@pytest.mark.parametrize("axes, rows", [("1,1,4,1", 4), ("1,2,2,1", 8), ("1,3,1,1", 6)])
def test_the_backward_pass_gathers_kernels_and_no_activations(axes, rows):
    """Nor deals them out anew: several rows on a device, an odd number of devices."""
    attention = dataclasses.replace(BLOCKS, across_sequence="ring")
    config = tiny_config(d_model=96, d_ff=192, vocab_size=96, attention=attention)
    found = what_a_step_sends(axes, config, tiny_batch(7, rows=rows, length=32))
    moved = [c for c in found if c.kind in ("all-gather", "all-to-all")]
    assert all(c.axes == ("fsdp",) and c.kind == "all-gather" for c in moved), moved
    # Of one layer in a scan over two: seven kernels forward, again backward; table and head.
    assert sum(c.times for c in moved) == (0 if axes == "1,1,4,1" else 2 * 7 * 2 + 2), moved
