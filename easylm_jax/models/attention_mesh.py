"""Attention over the device mesh: which rows, heads and keys each device gets.

Rows of the batch and heads never meet in attention, so every device attends for its own. A row that
mesh axis `sequence` splits into P parts is another matter (`across`):

    gather      queries stay, keys and values of the whole row are gathered on every device
    ring        keys and values travel round the P devices; see ring.py
    all_to_all  heads are exchanged for rows: K / P heads of whole rows, and back (Ulysses,
                Jacobs et al. 2023, arXiv:2309.14509)

Called by attention.py alone. The compiler alone would partition the kernels badly.
"""

import functools
from collections.abc import Callable

import jax
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from easylm_jax.array_types import Keys, PRNGKey, Queries
from easylm_jax.mesh import BATCH_AXES
from easylm_jax.sharding import per_device


def on_each_device(
    run: Callable[..., Queries],
    q_BTNH: Queries,
    k_BSKH: Keys,
    v_BSKH: Keys,
    ids: tuple[Array, Array, Array, Array],
    first_row: Int[Array, ""] | int,
    key: PRNGKey | None,
    *,
    across: str,
) -> Queries:
    """`run` on each device's part of the arguments; as it is where no mesh is set.

    `across` is gather, ring or all_to_all; or `whole`, for a query that is not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(q_BTNH, k_BSKH, v_BSKH, *ids, first_row, key)
    check_splits(mesh.shape, q_BTNH.shape[1], k_BSKH.shape[2], across)

    def local(q, k, v, q_seg, k_seg, q_pos, k_pos, first_row, key):
        if key is not None:
            for axis in mesh.axis_names:
                key = jax.random.fold_in(key, lax.axis_index(axis))
        ids = (q_seg, k_seg, q_pos, k_pos)
        if across == "all_to_all":
            swap = functools.partial(lax.all_to_all, axis_name="sequence", tiled=True)
            q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q, k, v))
            return swap(run(q, k, v, *ids, first_row, key), split_axis=1, concat_axis=2)
        first_row += lax.axis_index("sequence") * q.shape[1]
        return run(q, k, v, *ids, first_row, key)

    split = None if across == "whole" else "sequence"
    split_k = None if across in ("whole", "gather") else "sequence"
    split_ids_q, split_ids_k = (None if across == "all_to_all" else x for x in (split, split_k))
    ids_q, ids_k = P(BATCH_AXES, split_ids_q), P(BATCH_AXES, split_ids_k)
    q_spec = P(BATCH_AXES, split, "tensor", None)
    k_spec = P(BATCH_AXES, split_k, "tensor", None)
    return per_device(
        local,
        in_specs=(q_spec, k_spec, k_spec, ids_q, ids_k, ids_q, ids_k, P(), P()),
        out_specs=q_spec,
    )(q_BTNH, k_BSKH, v_BSKH, *ids, first_row, key)


def check_splits(sizes: dict[str, int], T: int, K: int, across: str) -> None:
    """Raise ValueError unless the mesh divides T queries and K key/value heads."""
    sequence, tensor = sizes["sequence"], sizes["tensor"]
    if across != "whole" and T % sequence:
        raise ValueError(
            f"rows of {T} tokens do not split over mesh axis sequence = {sequence}; use a "
            f"multiple of {sequence} tokens"
        )
    ways = tensor * sequence if across == "all_to_all" else tensor
    if K % ways:
        what = "tensor x sequence" if across == "all_to_all" else "tensor"
        other = "; attention.across_sequence = 'ring' or 'gather' splits no heads"
        raise ValueError(
            f"{K} key/value heads do not split over {what} = {ways}; use sizes whose product "
            f"divides {K}{other if across == 'all_to_all' else ''}"
        )
