"""One training step: a pure function, jitted by the trainer.

The order of a training step: sums of the objective and their gradients, added over micro-batches in
float32; one division by the summed weight; the guard's verdict; the optimiser. Nothing here talks
to the host.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

from easylm_jax.array_types import Params, Scalar
from easylm_jax.batch import Batch
from easylm_jax.objectives import Objective, Sums
from easylm_jax.sharding import BATCH_SPEC, constrain
from easylm_jax.train_state import LossTrend, TrainState

Metrics = dict[str, Scalar]
ON_BAD_LOSS = ("ignore", "skip", "stop")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What to do about a loss that is not finite or jumps.

    A step is bad when its loss or gradient norm is not finite, or when its loss lies more than
    `spike_deviations` running standard deviations above the running mean. `skip` leaves parameters
    and optimiser as they were and goes on; `stop` does the same and ends the run.
    """

    on_bad_loss: str = "skip"
    spike_deviations: float = 0.0  # 0: only non-finite losses are bad
    warmup_steps: int = 100  # before which nothing counts as a spike
    decay: float = 0.98  # of the running mean and variance

    def __post_init__(self) -> None:
        if self.on_bad_loss not in ON_BAD_LOSS:
            raise ValueError(
                f"guard.on_bad_loss is {self.on_bad_loss!r}; it can be {', '.join(ON_BAD_LOSS)}"
            )


def jit_train_step(
    *, shardings: TrainState, **options: Any
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`train_step` with these options, compiled on first use; the state it is given is donated."""
    step = functools.partial(train_step, **options)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective,
    frozen: Any = None,
    optimizer: optax.GradientTransformation,
    num_micro_batches: int,
    guard: GuardConfig,
    has_dropout: bool = True,
) -> tuple[TrainState, Metrics]:
    """The state after one update from `batch` ([B, T], B a multiple of `num_micro_batches`).

    An objective that draws no numbers (`has_dropout` False) needs less of the network.

    Metrics: the objective's entries as means, `grad_norm`, `loss_weight` (its sum), and
    `skipped` (1.0 where the guard refused the update).
    """
    rng = jax.random.fold_in(state.rng, state.step)
    options = dict(num_micro_batches=num_micro_batches, has_dropout=has_dropout)
    sums, grads = _summed_gradients(objective, state.params, frozen, batch, rng, **options)
    weight = jnp.maximum(sums["loss"][1], 1e-8)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)
    metrics = {name: total / jnp.maximum(w, 1e-8) for name, (total, w) in sums.items()}
    metrics |= {"grad_norm": optax.tree.norm(grads), "loss_weight": sums["loss"][1]}

    good, trend = _judge(state.trend, metrics["loss"], metrics["grad_norm"], guard)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    refused = ~good & (guard.on_bad_loss != "ignore")
    params, opt_state = _where(refused, (state.params, state.opt_state), (params, opt_state))
    metrics["skipped"] = refused.astype(jnp.float32)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, trend=trend)
    return state, metrics


def _summed_gradients(
    objective: Objective,
    params: Params,
    frozen: Any,
    batch: Batch,
    rng: Array,
    *,
    num_micro_batches,
    has_dropout,
) -> tuple[Sums, Params]:
    """The sums of `objective` over the batch, and the gradient of the sum of the loss."""

    def loss_sum(params, batch, rng):
        sums = objective(params, frozen, batch, rng)
        return sums["loss"][0], sums

    def one(batch, rng):
        (_, sums), grads = jax.value_and_grad(loss_sum, has_aux=True)(params, batch, rng)
        return sums, grads

    if num_micro_batches == 1:
        return one(batch, rng)

    def add_all(batch, rng):
        def add_one(carry, indexed):
            index, micro = indexed
            micro = jax.tree.map(lambda x: constrain(x, *BATCH_SPEC) if x.ndim == 2 else x, micro)
            new = one(micro, jax.random.fold_in(rng, index))
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, new), None

        # Rows are dealt out in turn: each micro-batch takes an equal part of every device's.
        micro_batches = jax.tree.map(
            lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1), batch
        )
        indexed = (jnp.arange(num_micro_batches), micro_batches)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro_batches), rng)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
        return jax.lax.scan(add_one, zeros, indexed)[0]

    # Masks drawn by each replica for itself would be others on another mesh.
    return add_all(batch, rng) if has_dropout else _by_replica(add_all, batch, rng)


def _by_replica(add_all: Callable, batch: Batch, rng: Array) -> tuple[Sums, Params]:
    """The sum over replicas of `add_all(batch, rng)`, for which each takes its own rows.

    So the network between replicas, often slow, is used once a step, not in every micro-batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["replica"] == 1:
        return add_all(batch, rng)
    return jax.shard_map(
        lambda batch, rng: jax.lax.psum(add_all(batch, rng), "replica"),
        in_specs=(P("replica"), P()),
        out_specs=P(),
        axis_names={"replica"},
        check_vma=False,
    )(batch, rng)


def _judge(
    trend: LossTrend, loss: Scalar, grad_norm: Scalar, guard: GuardConfig
) -> tuple[Array, LossTrend]:
    """Whether the step is good, and the trend with its loss added if it is."""
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if guard.spike_deviations > 0:
        limit = trend.mean + guard.spike_deviations * jnp.sqrt(trend.variance)
        good &= (loss <= limit) | (trend.count < guard.warmup_steps)
    change = jnp.where(good, loss - trend.mean, 0.0)
    # The first losses weigh equally; later ones fade exponentially.
    rate = jnp.maximum(1.0 / (trend.count + 1), 1.0 - guard.decay)
    new = LossTrend(
        mean=trend.mean + rate * change,
        variance=(1.0 - rate) * (trend.variance + rate * change**2),
        count=trend.count + 1,
    )
    return good, _where(good, new, trend)


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
