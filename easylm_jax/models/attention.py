"""Causal attention over packed documents: one signature, two implementations to train with.

    attention(q_BTNH, k_BSKH, v_BSKH, segments..., positions..., implementation="blockwise")

Query t sees key s when both lie in the same segment (0 is padding and is never seen), when
positions[s] <= positions[t], and when s is inside the sliding window if there is one. A query that
sees nothing gets zeros. Query head n reads key/value head n // G, G = N / K.

`reference`, here, forms the whole [T, S] matrix and is differentiated by JAX; it is what the others
are tested against. `blockwise`, in blockwise.py, never forms it. Both mean the same, and so does
what answers a single query over a cache, whichever is asked for: `attend_one_query`, decoding.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from easylm_jax.array_types import Keys, PRNGKey, Queries
from easylm_jax.mesh import BATCH_AXES
from easylm_jax.models.attention_mask import MASKED, visible
from easylm_jax.models.blockwise import blockwise
from easylm_jax.models.decoding import attend_one_query
from easylm_jax.models.remat import tag

IMPLEMENTATIONS = ("reference", "blockwise")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How attention is computed; what it computes does not depend on `implementation` or blocks."""

    implementation: str = "blockwise"
    block_q: int = 256  # rows of a tile; a tile holds K * G * block_q * block_k scores in float32
    block_k: int = 256
    sliding_window: int | None = None  # a query sees this many tokens back, itself included
    dropout: float = 0.0  # on the attention probabilities

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"unknown attention implementation {self.implementation!r}; there are "
                f"{', '.join(IMPLEMENTATIONS)}"
            )


def attention(
    q_BTNH: Queries,
    k_BSKH: Keys,
    v_BSKH: Keys,
    *,
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    config: AttentionConfig,
    cache_index: Int[Array, ""] | None = None,
    dropout_key: PRNGKey | None = None,
) -> Queries:
    """Attention output, in the type of q. Dropout acts only when a key is given.

    The rows must be in order: a key that lies later in the row than a query is one the query must
    not see. Query t lies where key t does, or with a cache where key `cache_index` + t does.
    Attention dropout draws other numbers on another mesh; everything else is the same on all.
    """
    options = dict(window=config.sliding_window, dropout=config.dropout)
    run = functools.partial(_reference, **options)
    one_query = cache_index is not None and q_BTNH.shape[1] == 1
    if one_query:
        run = functools.partial(attend_one_query, window=config.sliding_window)
    elif config.implementation == "blockwise":
        blocks = dict(block_q=config.block_q, block_k=config.block_k)
        run = functools.partial(blockwise, cached=cache_index is not None, **blocks, **options)
    mesh = jax.sharding.get_abstract_mesh()
    ids = (q_segments, k_segments, q_positions, k_positions)
    start = 0 if cache_index is None else cache_index
    if mesh.empty:
        return run(q_BTNH, k_BSKH, v_BSKH, *ids, start, dropout_key)

    # Each device handles its own rows and heads. Queries may be split along the sequence, keys and
    # values are gathered along it. The compiler alone would partition the tile loops badly.
    def local(q, k, v, q_seg, k_seg, q_pos, k_pos, start, key):
        first_row = start + lax.axis_index("sequence") * q.shape[1]
        if key is not None:
            for axis in mesh.axis_names:
                key = jax.random.fold_in(key, lax.axis_index(axis))
        return run(q, k, v, q_seg, k_seg, q_pos, k_pos, first_row, key)

    along = None if one_query else "sequence"
    rows_q, rows_k = P(BATCH_AXES, along), P(BATCH_AXES, None)
    q_spec = P(BATCH_AXES, along, "tensor", None)
    k_spec = P(BATCH_AXES, None, "tensor", None)
    return jax.shard_map(
        local,
        in_specs=(q_spec, k_spec, k_spec, rows_q, rows_k, rows_q, rows_k, P(), P()),
        out_specs=q_spec,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, *ids, start, dropout_key)


def _reference(
    q_BTNH, k_BSKH, v_BSKH, q_seg, k_seg, q_pos, k_pos, first_row, key, *, window, dropout
):
    """The definition, in four lines of algebra; the mask alone decides, not `first_row`."""
    del first_row
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    mask = visible(q_seg, k_seg, q_pos, k_pos, window)[:, None, None]
    probs = jax.nn.softmax(jnp.where(mask, scores, MASKED)) * mask
    if key is not None:
        keep = jax.random.bernoulli(key, 1 - dropout, probs.shape)
        probs = probs * keep / (1 - dropout)
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH", probs.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
    )
    out_BTNH = out.reshape(B, T, N, H).astype(q_BTNH.dtype)
    return tag(out_BTNH, "attention_out")
