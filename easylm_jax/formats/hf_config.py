"""Hugging Face's `config.json` as a LlamaConfig and back, for the families that are this model.

Llama (SmolLM and SmolLM2 among them), Mistral and Qwen2. What this model lacks is refused by name.
Keys that say nothing about the function (dropout, initialisation, caching) are not looked at. The
type of the weights is read off the tensors, not here. Called by `hf.py`.
"""

from typing import Any

from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import LlamaConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}

# What a file may leave out, with the defaults of the classes in transformers.
COMMON_DEFAULTS = {
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_parameters": None,  # transformers >= 5; before, rope_theta and rope_scaling
    "rope_scaling": None,
    "rope_theta": 10_000.0,
}
DEFAULTS = {
    "llama": COMMON_DEFAULTS | {"max_position_embeddings": 2048},
    "mistral": COMMON_DEFAULTS | {"max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": COMMON_DEFAULTS
    | {
        "max_position_embeddings": 32_768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
}

# Key -> the values under which the model is ours; a file without the key is fine.
SUPPORTED = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def config_from_hf(said: dict[str, Any], path: str) -> LlamaConfig:
    """The model that the `config.json` at `path`, parsed, describes.

    Raises ValueError for a model that is not ours and for keys that are missing or no numbers.
    """
    family = said.get("model_type")
    if family not in DEFAULTS:
        raise ValueError(
            f"{path} describes a model of type {family!r}: known are {', '.join(DEFAULTS)}"
        )
    _check_supported(said, path)
    said = DEFAULTS[family] | said

    def integer(key: str) -> int:
        return _number(said, key, path, kind=int)

    num_heads, d_model = integer("num_attention_heads"), integer("hidden_size")
    grouped, explicit = said["num_key_value_heads"], said["head_dim"]
    rope = said["rope_parameters"] or said["rope_scaling"] or {}
    return LlamaConfig(
        vocab_size=integer("vocab_size"),
        d_model=d_model,
        num_layers=integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads if grouped is None else integer("num_key_value_heads"),
        head_dim=d_model // num_heads if explicit is None else integer("head_dim"),
        d_ff=integer("intermediate_size"),
        max_seq_len=integer("max_position_embeddings"),
        norm_eps=_number(said, "rms_norm_eps", path),
        rope_theta=_number({"rope_theta": said["rope_theta"]} | rope, "rope_theta", path),
        rope_scaling=_rope_scaling(rope, path),
        tie_embeddings=bool(said["tie_word_embeddings"]),
        qkv_bias=family == "qwen2" or bool(said["attention_bias"]),
        attention=AttentionConfig(sliding_window=_sliding_window(said, path)),
    )


def _check_supported(said: dict[str, Any], path: str) -> None:
    for key, values in SUPPORTED.items():
        if key in said and said[key] not in values:
            raise ValueError(
                f"{path} has {key} = {said[key]!r}: this model knows only {values[0]!r} there"
            )


def _number(said: dict[str, Any], key: str, path: str, *, kind: type = float) -> Any:
    """A positive number of a file that may say anything."""
    value = said.get(key)
    fits = isinstance(value, int if kind is int else (int, float)) and value > 0
    if isinstance(value, bool) or not fits:
        got = f"says {value!r}" if key in said else "does not say"
        raise ValueError(f"{path} {got} for {key}: expected a positive {kind.__name__} there")
    return kind(value)


def _rope_scaling(rope: dict[str, Any], path: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"{path} scales rotary positions by {kind!r}: this model knows only 'llama3' and none"
        )
    return RopeScaling(
        factor=_number(rope, "factor", path),
        low_freq_factor=_number(rope, "low_freq_factor", path),
        high_freq_factor=_number(rope, "high_freq_factor", path),
        original_max_position=_number(rope, "original_max_position_embeddings", path, kind=int),
    )


def _sliding_window(said: dict[str, Any], path: str) -> int | None:
    """One window for all layers or none: Llama has none, Qwen2 may have one in its later layers."""
    family, num_layers = said["model_type"], said["num_hidden_layers"]
    if family == "llama" or said["sliding_window"] is None:
        return None
    if family == "qwen2":
        if not said["use_sliding_window"]:
            return None
        layers = said["layer_types"] or [
            "sliding_attention" if i >= said["max_window_layers"] else "full_attention"
            for i in range(num_layers)
        ]
        if "sliding_attention" not in layers:
            return None
        if set(layers) != {"sliding_attention"}:
            raise ValueError(
                f"{path} has a sliding window in {layers.count('sliding_attention')} of "
                f"{num_layers} layers: this model knows it in all or in none"
            )
    return _number(said, "sliding_window", path, kind=int)


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The content of a `config.json`, in keys that transformers has read since its version 4.43."""
    window = config.attention.sliding_window
    family = "llama"
    if config.qkv_bias:
        family = "qwen2"  # Llama's attention_bias would want one on o too
    elif window or config.d_model % config.num_heads:
        family = "mistral"  # which also may have heads that do not divide the width
    said = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if (scaling := config.rope_scaling) is not None:
        said["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    if family == "mistral":
        said["sliding_window"] = window
    if family == "qwen2":
        said |= {"use_sliding_window": bool(window), "sliding_window": window}
        said["max_window_layers"] = 0 if window else config.num_layers  # the first with a window
    return said
