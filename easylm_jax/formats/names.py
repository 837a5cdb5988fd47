"""What the parameters are called elsewhere: one table per foreign format, used in both directions.

An `Entry` pairs a foreign tensor name with the path of our parameter and says how the two arrays
differ. Nothing else in the package knows a foreign parameter name. Our layers are stacked, so an
entry whose name has `{layer}` stands for L foreign tensors and one array with a leading dim L.
"""

import dataclasses
from typing import Literal

import numpy as np

from easylm_jax.models.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a table.

    `transpose`: the foreign matrix is [out, in], ours [in, out]. `pairs`: the foreign model rotates
    neighbours (2i, 2i + 1) of each head where ours rotates (i, i + H/2), so the outputs of this
    projection are reordered within each head; q has N heads, k has K.
    """

    foreign: str
    ours: str
    transpose: bool = False
    pairs: Literal["q", "k"] | None = None


Table = tuple[Entry, ...]


_HF_LAYER = "model.layers.{layer}."
HF: Table = (
    Entry("model.embed_tokens.weight", "embed/embedding"),
    Entry(_HF_LAYER + "input_layernorm.weight", "layers/attention_norm/scale"),
    Entry(_HF_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
    Entry(_HF_LAYER + "self_attn.q_proj.weight", "layers/attention/q/kernel", True),
    Entry(_HF_LAYER + "self_attn.k_proj.weight", "layers/attention/k/kernel", True),
    Entry(_HF_LAYER + "self_attn.v_proj.weight", "layers/attention/v/kernel", True),
    Entry(_HF_LAYER + "self_attn.o_proj.weight", "layers/attention/o/kernel", True),
    Entry(_HF_LAYER + "self_attn.q_proj.bias", "layers/attention/q/bias"),
    Entry(_HF_LAYER + "self_attn.k_proj.bias", "layers/attention/k/bias"),
    Entry(_HF_LAYER + "self_attn.v_proj.bias", "layers/attention/v/bias"),
    Entry(_HF_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", True),
    Entry(_HF_LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", True),
    Entry(_HF_LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", True),
    Entry("model.norm.weight", "final_norm/scale"),
    Entry("lm_head.weight", "lm_head/kernel", True),
)

META: Table = (
    Entry("tok_embeddings.weight", "embed/embedding"),
    Entry("layers.{layer}.attention_norm.weight", "layers/attention_norm/scale"),
    Entry("layers.{layer}.ffn_norm.weight", "layers/mlp_norm/scale"),
    Entry("layers.{layer}.attention.wq.weight", "layers/attention/q/kernel", True, "q"),
    Entry("layers.{layer}.attention.wk.weight", "layers/attention/k/kernel", True, "k"),
    Entry("layers.{layer}.attention.wv.weight", "layers/attention/v/kernel", True),
    Entry("layers.{layer}.attention.wo.weight", "layers/attention/o/kernel", True),
    Entry("layers.{layer}.feed_forward.w1.weight", "layers/mlp/gate/kernel", True),
    Entry("layers.{layer}.feed_forward.w3.weight", "layers/mlp/up/kernel", True),
    Entry("layers.{layer}.feed_forward.w2.weight", "layers/mlp/down/kernel", True),
    Entry("norm.weight", "final_norm/scale"),
    Entry("output.weight", "lm_head/kernel", True),
)

# EasyLM's parameter paths, "/"-joined. Matrices are [in, out] as ours, rotation is Meta's.
EASYLM: Table = (
    Entry("transformer/wte/embedding", "embed/embedding"),
    Entry("transformer/h/{layer}/attention_norm/kernel", "layers/attention_norm/scale"),
    Entry("transformer/h/{layer}/ffn_norm/kernel", "layers/mlp_norm/scale"),
    Entry("transformer/h/{layer}/attention/wq/kernel", "layers/attention/q/kernel", pairs="q"),
    Entry("transformer/h/{layer}/attention/wk/kernel", "layers/attention/k/kernel", pairs="k"),
    Entry("transformer/h/{layer}/attention/wv/kernel", "layers/attention/v/kernel"),
    Entry("transformer/h/{layer}/attention/wo/kernel", "layers/attention/o/kernel"),
    Entry("transformer/h/{layer}/feed_forward/w1/kernel", "layers/mlp/gate/kernel"),
    Entry("transformer/h/{layer}/feed_forward/w3/kernel", "layers/mlp/up/kernel"),
    Entry("transformer/h/{layer}/feed_forward/w2/kernel", "layers/mlp/down/kernel"),
    Entry("transformer/ln_f/kernel", "final_norm/scale"),
    Entry("lm_head/kernel", "lm_head/kernel"),
)

# llama.cpp's names. The `llama` architecture rotates neighbours; `qwen2` rotates halves, as we do.
_GGUF_COMMON: Table = (
    Entry("token_embd.weight", "embed/embedding"),
    Entry("blk.{layer}.attn_norm.weight", "layers/attention_norm/scale"),
    Entry("blk.{layer}.ffn_norm.weight", "layers/mlp_norm/scale"),
    Entry("blk.{layer}.attn_v.weight", "layers/attention/v/kernel", True),
    Entry("blk.{layer}.attn_v.bias", "layers/attention/v/bias"),
    Entry("blk.{layer}.attn_output.weight", "layers/attention/o/kernel", True),
    Entry("blk.{layer}.ffn_gate.weight", "layers/mlp/gate/kernel", True),
    Entry("blk.{layer}.ffn_up.weight", "layers/mlp/up/kernel", True),
    Entry("blk.{layer}.ffn_down.weight", "layers/mlp/down/kernel", True),
    Entry("output_norm.weight", "final_norm/scale"),
    Entry("output.weight", "lm_head/kernel", True),
)
GGUF_LLAMA: Table = (
    *_GGUF_COMMON,
    Entry("blk.{layer}.attn_q.weight", "layers/attention/q/kernel", True, "q"),
    Entry("blk.{layer}.attn_q.bias", "layers/attention/q/bias", pairs="q"),
    Entry("blk.{layer}.attn_k.weight", "layers/attention/k/kernel", True, "k"),
    Entry("blk.{layer}.attn_k.bias", "layers/attention/k/bias", pairs="k"),
)
GGUF_QWEN2: Table = (
    *_GGUF_COMMON,
    *(Entry(f"blk.{{layer}}.attn_{p}.weight", f"layers/attention/{p}/kernel", True) for p in "qk"),
    *(Entry(f"blk.{{layer}}.attn_{p}.bias", f"layers/attention/{p}/bias") for p in "qk"),
)


def to_ours(entry: Entry, x: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """The foreign tensor of one layer as ours; a view unless the entry has `pairs`."""
    if entry.transpose:
        x = x.T
    if entry.pairs:
        x = x.reshape(*x.shape[:-1], _heads(entry, config), -1, 2)
        x = x.swapaxes(-1, -2).reshape(*x.shape[:-3], -1)
    return x


def to_foreign(entry: Entry, x: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """The inverse of `to_ours`."""
    if entry.pairs:
        x = x.reshape(*x.shape[:-1], _heads(entry, config), 2, -1)
        x = x.swapaxes(-1, -2).reshape(*x.shape[:-3], -1)
    return x.T if entry.transpose else x


def _heads(entry: Entry, config: LlamaConfig) -> int:
    return config.num_heads if entry.pairs == "q" else config.num_kv_heads
