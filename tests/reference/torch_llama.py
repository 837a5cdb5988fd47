"""Our parameter tree as a transformers model, and transformers' gradients as our tree.

For tests only, and independent of `easylm_jax/formats`, which converts checkpoints. The class
follows from the tree: Qwen2 for biases on q, k, v only, Mistral for a sliding window, Llama for the
rest (transformers has no model with both a bias on o and a window).
"""

from collections.abc import Iterator

import jax
import numpy as np
import torch
import transformers

from tests.reference.numpy_llama import Dims, Tree

LAYER_NAMES = {  # our path within a layer -> transformers' module within a layer
    ("attention_norm",): "input_layernorm",
    ("attention", "q"): "self_attn.q_proj",
    ("attention", "k"): "self_attn.k_proj",
    ("attention", "v"): "self_attn.v_proj",
    ("attention", "o"): "self_attn.o_proj",
    ("mlp_norm",): "post_attention_layernorm",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
OTHER_NAMES = {
    ("embed",): "model.embed_tokens",
    ("final_norm",): "model.norm",
    ("lm_head",): "lm_head",
}


def to_hf(params: Tree, dims: Dims, *, dtype=torch.float32) -> transformers.PreTrainedModel:
    """The transformers model with these weights, eager attention, ready for logits or gradients."""
    model = empty_model(params, dims).to(dtype).eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for path, array in jax.tree.leaves_with_path(params):
            for name, part in hf_parts(tuple(key.key for key in path), np.asarray(array)):
                target = weights.pop(name)
                assert target.shape == part.shape, name
                target.copy_(torch.tensor(part))
    assert not weights, f"not filled: {sorted(weights)}"
    return model


def hf_parts(path: tuple[str, ...], array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of the torch parameters that one leaf of ours is: one a layer, or just one."""
    *module, leaf = path
    suffix = "bias" if leaf == "bias" else "weight"
    if module[0] == "layers":
        for layer, part in enumerate(array):
            name = f"model.layers.{layer}.{LAYER_NAMES[tuple(module[1:])]}.{suffix}"
            yield name, part.T if leaf == "kernel" else part  # torch keeps [out, in]
    else:
        yield f"{OTHER_NAMES[tuple(module)]}.{suffix}", array.T if leaf == "kernel" else array


def empty_model(params: Tree, dims: Dims) -> transformers.PreTrainedModel:
    attention = params["layers"]["attention"]
    has_qkv_bias, has_o_bias = "bias" in attention["q"], "bias" in attention["o"]
    vocab, width = params["embed"]["embedding"].shape
    num_layers, _, ffn = params["layers"]["mlp"]["up"]["kernel"].shape
    common = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_kv_heads,
        "head_dim": dims.head_dim,
        "rms_norm_eps": dims.norm_eps,
        "tie_word_embeddings": dims.tied,
        "rope_parameters": rope_parameters(dims),
        "attn_implementation": "eager",
    }
    if has_qkv_bias and not has_o_bias:
        window = {"sliding_window": dims.sliding_window, "max_window_layers": 0}
        use_window = dims.sliding_window is not None
        config = transformers.Qwen2Config(**common, **window, use_sliding_window=use_window)
        return transformers.Qwen2ForCausalLM(config)
    if dims.sliding_window is not None:
        config = transformers.MistralConfig(**common, sliding_window=dims.sliding_window)
        return transformers.MistralForCausalLM(config)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**common, attention_bias=has_o_bias)
    )


def rope_parameters(dims: Dims) -> dict:
    scaling = dims.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": dims.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": dims.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def hf_logits_loss_and_grads(
    model: transformers.PreTrainedModel,
    params: Tree,
    *,
    tokens: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    segment_ids: np.ndarray,
    positions: np.ndarray,
) -> tuple[np.ndarray, float, Tree]:
    """Logits, sum of weights * -log p(target), and its gradients as a tree like `params`.

    transformers makes the mask: it finds documents by the jumps in `positions`. `segment_ids` are
    not used, so logits on padding mean nothing.
    """
    logits = model(
        input_ids=torch.tensor(tokens), position_ids=torch.tensor(positions), use_cache=False
    ).logits
    log_probs = torch.log_softmax(logits, dim=-1)
    target_log_probs = log_probs.gather(-1, torch.tensor(targets)[..., None])[..., 0]
    loss_sum = -(torch.tensor(weights) * target_log_probs).sum()
    model.zero_grad()
    loss_sum.backward()
    weights_by_name = dict(model.named_parameters())

    def grad_like(path, array):
        path = tuple(key.key for key in path)
        names = [name for name, _ in hf_parts(path, np.asarray(array))]
        grads = [weights_by_name[name].grad.numpy() for name in names]
        grads = [grad.T if path[-1] == "kernel" else grad for grad in grads]
        return np.stack(grads) if path[0] == "layers" else grads[0]

    return (
        logits.detach().numpy(),
        float(loss_sum.detach()),
        jax.tree.map_with_path(grad_like, params),
    )
