"""From rules over parameter paths to shardings, and constraints on activations.

A rule is (regular expression over the path, one mesh axis or None per dimension). The first rule
whose expression is found in a path wins. The same rules serve the optimiser state, adapters and
imported checkpoints, because their paths contain the parameter's path.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from easylm_jax.mesh import BATCH_AXES
from easylm_jax.tree import map_named, matches, named_leaves

Rules = Sequence[tuple[str, P]]

BATCH_SPEC = P(BATCH_AXES, "sequence")  # every [B, T] array


def spec_for(name: str, shape: tuple[int, ...], rules: Rules) -> P:
    """The partition spec of one leaf.

    Dims of size 1 are not split. Leaves whose rank differs from their rule's are replicated:
    factored moments of Adafactor, which are small. `sharding_table` shows them.

    Raises:
      ValueError: no rule matches `name`.
    """
    if math.prod(shape) == 1:
        return P()
    for pattern, spec in rules:
        if matches(pattern, name):
            if len(spec) != len(shape):
                return P()
            return P(*(axes if size > 1 else None for axes, size in zip(spec, shape, strict=True)))
    raise ValueError(
        f"no sharding rule matches the parameter {name} of shape {shape}; add a rule for it"
    )


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """A NamedSharding for every leaf of `tree` (arrays or `jax.ShapeDtypeStruct`).

    Raises:
      ValueError: a leaf without a rule, or a dimension that its mesh axes do not divide.
    """

    def leaf_sharding(name: str, leaf: Any) -> NamedSharding:
        spec = spec_for(name, leaf.shape, rules)
        check_spec(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return map_named(leaf_sharding, tree)


def check_spec(
    name: str, shape: tuple[int, ...], spec: P, mesh: Mesh | jax.sharding.AbstractMesh
) -> None:
    """Raise ValueError for a dimension of the leaf `name` that its mesh axes do not divide."""
    for dim, axes in enumerate(spec):
        axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if shape[dim] % ways:
            fits = [n for n in range(ways, 0, -1) if shape[dim] % n == 0]
            raise ValueError(
                f"{name} has size {shape[dim]} in dim {dim}, which mesh axis {'x'.join(axes)} = "
                f"{ways} does not divide ({shape[dim] % ways} left over); {fits[0]} would fit"
            )


def sharding_table(tree: Any, mesh: Mesh, rules: Rules) -> str:
    """One line per leaf: path, shape, partition spec, bytes per device. For people."""
    lines = []
    for name, leaf in named_leaves(tree).items():
        sharding = NamedSharding(mesh, spec_for(name, leaf.shape, rules))
        shard = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        lines.append(f"{name:50s} {str(leaf.shape):24s} {str(sharding.spec):40s} {shard:>14,} B")
    return "\n".join(lines)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch of `batch_size` rows that this process's devices hold, in order."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in held for row in range(*rows.indices(batch_size))})


def to_global(tree: Any, mesh: Mesh, batch_size: int) -> Any:
    """This process's rows (NumPy, those of `local_rows`) as arrays over the whole mesh.

    [B, T] arrays are split over rows and sequence; other arrays whose first dim is B over rows.
    """
    place = {row: i for i, row in enumerate(local_rows(mesh, batch_size))}

    def leaf_to_global(local: np.ndarray) -> Array:
        spec = BATCH_SPEC if local.ndim == 2 else P(BATCH_AXES)
        shape = (batch_size, *local.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            rows = [place[row] for row in range(*index[0].indices(batch_size))]
            return local[(rows, *index[1:])]

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)

    return jax.tree.map(leaf_to_global, tree)


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """`x`, told to be split so over the mesh set by `jax.set_mesh`; unchanged where none is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, _automatic(P(*axes)))


def per_device(function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over the whole mesh, also inside one over some of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    drop = functools.partial(jax.tree.map, _automatic, is_leaf=lambda x: isinstance(x, P))
    return jax.shard_map(
        function,
        in_specs=drop(in_specs),
        out_specs=drop(out_specs),
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )


def _automatic(spec: P) -> P:
    """`spec` without the axes that an enclosing shard_map has split already."""
    taken = jax.sharding.get_abstract_mesh().manual_axes

    def left(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(axes, tuple):
            return tuple(axis for axis in axes if axis not in taken)
        return None if axes in taken else axes

    return P(*map(left, spec))
