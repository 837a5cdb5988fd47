"""What generating needs of the model and training does not. Called by llama.py and sampler.py.

The key/value cache; attention of one new query over it; and parameters with arrays of their own for
every layer, from which a step is twice as fast as from stacked ones, since XLA on CPU copies each
layer out of the stack before it uses it.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import Array
from jaxtyping import Float, Int

from easylm_jax.array_types import Keys, Params, Queries, Tokens
from easylm_jax.dots import dot_f32
from easylm_jax.models.attention_mask import MASKED, visible
from easylm_jax.tree import named_leaves

MAX_SINGLE_HEADS = 8  # more would make the program of a step too long


@flax.struct.dataclass
class KVCache:
    """Keys and values of the S slots filled so far, for generating token by token.

    New entries go to slots [index, index + T) in every row; None says that all slots are empty. A
    slot with segment id 0 is seen by nobody, so prompts of different lengths share one cache by
    being padded. Keys and values lie as the products of a new query read them.
    """

    layers: Any  # (keys [L, B, K, H, S], values [L, B, K, S, H]); not scanned: L pairs without L
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    index: Int[Array, ""] | None

    def with_ids(self, segment_ids: Tokens, positions: Tokens) -> "KVCache":
        """The cache with T more slots in use, whose keys and values are still to be written."""
        start = jnp.int32(0) if self.index is None else self.index
        update = jax.lax.dynamic_update_slice_in_dim
        return self.replace(
            segment_ids=update(self.segment_ids, segment_ids, start, 1),
            positions=update(self.positions, positions, start, 1),
            index=start + segment_ids.shape[1],
        )


def init_cache(config: Any, batch: int, length: int) -> KVCache:
    """An empty cache of `length` slots for `batch` rows, in the compute type of a LlamaConfig."""
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim

    def pair(*lead: int) -> tuple[Array, Array]:
        shapes = (*lead, batch, K, H, length), (*lead, batch, K, length, H)
        return tuple(jnp.zeros(shape, config.dtype) for shape in shapes)

    layers = pair(L) if config.scan_layers else tuple(pair() for _ in range(L))
    ids = jnp.zeros((batch, length), jnp.int32)
    return KVCache(layers, segment_ids=ids, positions=ids, index=None)


LayerCache = tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]]


def write_cache(
    cache: LayerCache,
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    index: Int[Array, ""] | None,
) -> LayerCache:
    """One layer's cache with T more slots filled, from slot `index` on; None is 0."""
    k_BKHS, v_BKSH = cache
    start = 0 if index is None else index
    update = jax.lax.dynamic_update_slice_in_dim
    new_k, new_v = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
    return (
        update(k_BKHS, new_k.astype(k_BKHS.dtype), start, 3),
        update(v_BKSH, new_v.astype(v_BKSH.dtype), start, 2),
    )


def read_cache(cache: LayerCache) -> tuple[Keys, Keys]:
    """Keys and values in the layout of `attention`."""
    k_BKHS, v_BKSH = cache
    return k_BKHS.transpose(0, 3, 1, 2), v_BKSH.swapaxes(1, 2)


def attend_one_query(
    q_BTNH, k_BSKH, v_BSKH, q_seg, k_seg, q_pos, k_pos, first_row, key, *, window
) -> Queries:
    """Attention where T = 1, over keys and values in the cache's order, without dropout."""
    del first_row, key
    B, _, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGH = q_BTNH.reshape(B, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)
    mask_BKGS = visible(q_seg, k_seg, q_pos, k_pos, window)[:, None]  # K and G are 1 here

    def attend(q_BKGH, k_BKHS, v_BKSH):
        scores = dot_f32(q_BKGH, k_BKHS, (3,), (2,), batch=(0, 1))
        probs = jax.nn.softmax(jnp.where(mask_BKGS, scores, MASKED)) * mask_BKGS
        return dot_f32(probs.astype(v_BKSH.dtype), v_BKSH, (3,), (2,), batch=(0, 1))

    arrays = (q_BKGH, k_BSKH.transpose(0, 2, 3, 1), v_BSKH.swapaxes(1, 2))  # as the cache has them
    if B == 1 and K <= MAX_SINGLE_HEADS:
        # For a lone row XLA on CPU would copy the whole cache four times; a head at a time, never.
        heads = [attend(*(x[:, i : i + 1] for x in arrays)) for i in range(K)]
        out_BKGH = jnp.concatenate(heads, axis=1)
    else:
        out_BKGH = attend(*arrays)
    return out_BKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def unstack_layers(params: Params) -> Params:
    """The parameters for `scan_layers=False`. Frees `params`, whose stacked arrays it consumes.

    One stacked array at a time is cut into its L layers, so that memory holds one of them twice.
    """
    cut = jax.jit(lambda x: tuple(x[i] for i in range(x.shape[0])))
    layers = [{} for _ in range(jax.tree.leaves(params["layers"])[0].shape[0])]
    for name, stacked in named_leaves(params["layers"]).items():
        for layer, own in zip(layers, jax.block_until_ready(cut(stacked)), strict=True):
            layer[name] = own
        stacked.delete()
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {f"layers_{i}": unflatten_dict(x, sep="/") for i, x in enumerate(layers)}
