"""Causal attention over packed documents: one signature, and what it means.

    attention(q_BTNH, k_BSKH, v_BSKH, segments..., positions..., config=AttentionConfig())

Query t sees key s when both lie in the same segment (0 is padding and is never seen), when
positions[s] <= positions[t], and when s is inside the sliding window if there is one. A query that
sees nothing gets zeros. Query head n reads key/value head n // G, G = N / K.

All implementations mean the same: attention_choice.py says which runs, attention_reference.py is
the definition in four lines of algebra, attention_mesh.py splits rows and heads over devices.
"""

import dataclasses

from jax import Array
from jaxtyping import Int

from easylm_jax.array_types import Keys, PRNGKey, Queries
from easylm_jax.models.attention_choice import check_choice, choose
from easylm_jax.models.attention_mesh import on_each_device


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How attention is computed; only the last two fields change what it computes."""

    implementation: str = "blockwise"
    across_sequence: str = "gather"  # how a row is attended that mesh axis `sequence` splits
    block_q: int = 256  # rows of a tile; a tile holds K * G * block_q * block_k scores in float32
    block_k: int = 256
    sliding_window: int | None = None  # a query sees this many tokens back, itself included
    dropout: float = 0.0  # on the attention probabilities

    def __post_init__(self) -> None:
        check_choice(self)


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
    `splash` and `tokamax` know rows, not positions: each document must be one run of tokens.
    """
    cached = cache_index is not None
    run, across = choose(config, cached=cached, num_queries=q_BTNH.shape[1])
    ids = (q_segments, k_segments, q_positions, k_positions)
    start = cache_index if cached else 0
    return on_each_device(run, q_BTNH, k_BSKH, v_BSKH, ids, start, dropout_key, across=across)
