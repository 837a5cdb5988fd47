"""The published models, by name: a table and nothing else. Sources beside each family.

`preset("llama_7b", remat="full")` is the published shape with some fields replaced. Numerics and
execution (types, remat, attention blocks) are not part of a shape and keep their defaults.
"""

import dataclasses
import difflib
from typing import Any

from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import LlamaConfig, RopeScaling


def _llama(layers, d_model, heads, kv_heads, d_ff, vocab, seq_len, **rest: Any) -> LlamaConfig:
    return LlamaConfig(
        num_layers=layers,
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=rest.pop("head_dim", d_model // heads),
        d_ff=d_ff,
        vocab_size=vocab,
        max_seq_len=seq_len,
        **rest,
    )


_LLAMA3 = dict(norm_eps=1e-5, rope_theta=500_000.0)
_LLAMA32 = dict(_LLAMA3, tie_embeddings=True, rope_scaling=RopeScaling(factor=32.0))
_WINDOW = AttentionConfig(sliding_window=4096)

PRESETS: dict[str, LlamaConfig] = {
    # Ours. `debug` is for unit tests, `tiny` for the quickstart, `small` and `1b` for benchmarks.
    "debug": _llama(2, 64, 4, 2, 128, 512, 256),
    "tiny": _llama(4, 256, 4, 4, 688, 4096, 512, tie_embeddings=True),
    "small": _llama(8, 512, 8, 8, 1376, 32_000, 4096),
    "1b": _llama(22, 2048, 16, 16, 5504, 32_000, 2048),  # EasyLM's llama_1b
    # LLaMA, table 2 of arXiv:2302.13971; feed-forward widths and eps from the released params.json
    "llama_7b": _llama(32, 4096, 32, 32, 11_008, 32_000, 2048),
    "llama_13b": _llama(40, 5120, 40, 40, 13_824, 32_000, 2048),
    "llama_33b": _llama(60, 6656, 52, 52, 17_920, 32_000, 2048),
    "llama_65b": _llama(80, 8192, 64, 64, 22_016, 32_000, 2048, norm_eps=1e-5),
    # Llama 2, arXiv:2307.09288
    "llama2_7b": _llama(32, 4096, 32, 32, 11_008, 32_000, 4096, norm_eps=1e-5),
    "llama2_13b": _llama(40, 5120, 40, 40, 13_824, 32_000, 4096, norm_eps=1e-5),
    "llama2_70b": _llama(80, 8192, 64, 8, 28_672, 32_000, 4096, norm_eps=1e-5),
    # Llama 3, arXiv:2407.21783, and the Llama 3.2 model cards
    "llama3_8b": _llama(32, 4096, 32, 8, 14_336, 128_256, 8192, **_LLAMA3),
    "llama3_70b": _llama(80, 8192, 64, 8, 28_672, 128_256, 8192, **_LLAMA3),
    "llama3.2_1b": _llama(16, 2048, 32, 8, 8192, 128_256, 131_072, **_LLAMA32),
    "llama3.2_3b": _llama(28, 3072, 24, 8, 8192, 128_256, 131_072, **_LLAMA32),
    # OpenLLaMA (Geng & Liu 2023)
    "open_llama_3b": _llama(26, 3200, 32, 32, 8640, 32_000, 2048),
    # SmolLM2, arXiv:2502.02737
    "smollm2_135m": _llama(
        30, 576, 9, 3, 1536, 49_152, 8192, norm_eps=1e-5, rope_theta=1e5, tie_embeddings=True
    ),
    "smollm2_360m": _llama(
        32, 960, 15, 5, 2560, 49_152, 8192, norm_eps=1e-5, rope_theta=1e5, tie_embeddings=True
    ),
    # Mistral 7B v0.1, arXiv:2310.06825
    "mistral_7b": _llama(32, 4096, 32, 8, 14_336, 32_000, 32_768, norm_eps=1e-5, attention=_WINDOW),
    # Qwen2, arXiv:2407.10671
    "qwen2_0.5b": _llama(
        24, 896, 14, 2, 4864, 151_936, 32_768, rope_theta=1e6, qkv_bias=True, tie_embeddings=True
    ),
}


def preset(name: str, **changes: Any) -> LlamaConfig:
    """The model `name` with some fields replaced.

    Raises:
      ValueError: no such model; names the near ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=4, cutoff=0.4) or list(PRESETS)
        raise ValueError(f"unknown model {name!r}; near it: {', '.join(near)}")
    return dataclasses.replace(PRESETS[name], **changes)
