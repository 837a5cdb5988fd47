"""TrainState: everything a step reads and writes, and so everything a checkpoint must hold."""

import typing
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from easylm_jax.array_types import Params, PRNGKey
from easylm_jax.sharding import Rules, tree_shardings


@typing.no_type_check  # JAX unflattens it with shapes, shardings and cut arrays as leaves
@flax.struct.dataclass
class LossTrend:
    """Running mean and variance of the loss, by which the guard knows a spike."""

    mean: Float[Array, ""]
    variance: Float[Array, ""]
    count: Int[Array, ""]


@typing.no_type_check  # JAX unflattens it with shapes, shardings and cut arrays as leaves
@flax.struct.dataclass
class TrainState:
    """The state after `step` steps."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    rng: PRNGKey  # of the run; step t uses fold_in(rng, t)
    trend: LossTrend


def init_state(
    init_params: Callable[[PRNGKey], Params], optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step. Pure: run it under `jax.jit` or `jax.eval_shape`."""
    params_key, rng = jax.random.split(jax.random.key(seed))
    params = init_params(params_key)
    zero = jnp.zeros((), jnp.float32)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=rng,
        trend=LossTrend(mean=zero, variance=zero, count=jnp.zeros((), jnp.int32)),
    )


def abstract_state(make_state: Callable[[], TrainState], mesh: Mesh, rules: Rules) -> TrainState:
    """Shapes, types and shardings of the state that `make_state` would make. No memory is used."""
    shapes = jax.eval_shape(make_state)
    shardings = tree_shardings(shapes, mesh, rules)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
