"""GGUF, llama.cpp's format: one file with metadata, tokenizer and tensors, often quantised.

Reads what the `gguf` package dequantises (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, the K and
most of the IQ types) under the architectures `llama` and `qwen2`; writes F32, F16, BF16, Q8_0 and
Q4_0. The container is in `gguf_header.py`, the tokenizer in `gguf_tokenizer.py`.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from easylm_jax.formats.foreign import Foreign, Model, foreign_shapes, foreign_tensors
from easylm_jax.formats.gguf_header import Header, is_gguf, read_header
from easylm_jax.formats.gguf_tokenizer import tokenizer_of, tokenizer_to_metadata
from easylm_jax.formats.names import GGUF_LLAMA, GGUF_QWEN2
from easylm_jax.models.llama import LlamaConfig, RopeScaling, rope_frequencies

__all__ = ["is_gguf", "open_gguf", "write_gguf"]

TABLES = {"llama": GGUF_LLAMA, "qwen2": GGUF_QWEN2}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling: H/2 divisors of the frequencies

STOPS = tuple(f"tokenizer.ggml.{which}_token_id" for which in ("eos", "eot", "eom"))

WRITABLE = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


# ---- reading ----------------------------------------------------------------------------------


def open_gguf(path: str) -> Foreign:
    """The model of a GGUF file, mapped into memory: nothing but the header is read."""
    header = read_header(path)
    metadata = header.metadata
    config = _config_of(header, path)
    pieces = metadata.get("tokenizer.ggml.tokens")
    if pieces is not None and len(pieces) != config.vocab_size:
        raise ValueError(
            f"the tokenizer of {path} has {len(pieces)} pieces and token_embd.weight "
            f"{config.vocab_size} rows: they must be equal, so the file is damaged or mixed"
        )
    return Foreign(
        path=path,
        config=config,
        table=TABLES[metadata["general.architecture"]],
        shapes={name: tensor.shape for name, tensor in header.tensors.items()},
        read=lambda name: _read_tensor(header, name, path),
        tokenizer=None if pieces is None else lambda: tokenizer_of(metadata, name=path),
        chat_template=metadata.get("tokenizer.chat_template"),
        ignored=(f"^{ROPE_FACTORS}$",),
        stop_ids=tuple(dict.fromkeys(i for i in map(metadata.get, STOPS) if type(i) is int)),
    )


def _config_of(header: Header, path: str) -> LlamaConfig:
    keys, tensors = header.metadata, header.tensors
    architecture = _needed(keys, "general.architecture", path)
    if architecture not in TABLES:
        raise ValueError(
            f"{path} holds a model of architecture {architecture!r}; only {' and '.join(TABLES)} "
            "can be read"
        )
    if keys.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one of {keys['split.count']} parts: join them with llama-gguf-split --merge"
        )
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path} has no tensor token_embd.weight: it holds a vocabulary alone")

    def of(key: str, otherwise: Any = None, *, kind: type = int) -> Any:
        key = f"{architecture}.{key}"
        found = _needed(keys, key, path) if otherwise is None else keys.get(key, otherwise)
        if isinstance(found, list) and "head_count" in key:
            raise ValueError(
                f"the layers of {path} differ in their number of heads; ours are alike"
            )
        if type(found) is not kind or not found > 0:
            raise ValueError(
                f"{path} says {found!r} for {key}: expected a positive {kind.__name__}"
            )
        return found

    d_model, num_heads = of("embedding_length"), of("attention.head_count")
    num_kv_heads = of("attention.head_count_kv", num_heads)
    head_dim = of("attention.key_length", d_model // num_heads)
    theta = of("rope.freq_base", 10_000.0, kind=float)
    return _with_rope_scaling(
        header,
        LlamaConfig(
            vocab_size=tensors["token_embd.weight"].shape[0],
            d_model=d_model,
            num_layers=of("block_count"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            d_ff=of("feed_forward_length"),
            max_seq_len=of("context_length"),
            norm_eps=_shortest(of("attention.layer_norm_rms_epsilon", kind=float)),
            rope_theta=_shortest(theta),
            tie_embeddings="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
        ),
        path,
    )


def _needed(keys: Mapping[str, Any], key: str, path: str) -> Any:
    if key not in keys:
        raise ValueError(f"{path} has no metadata key {key}: convert it again with llama.cpp")
    return keys[key]


def _shortest(x: float) -> float:
    """The decimal number that was stored as a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def _with_rope_scaling(header: Header, config: LlamaConfig, path: str) -> LlamaConfig:
    """`config` with the scaling whose factors are in the file; others are refused."""
    architecture = header.metadata["general.architecture"]
    kind = header.metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = header.metadata.get(f"{architecture}.rope.scaling.factor", 1.0)
    linear = header.metadata.get(f"{architecture}.rope.scale_linear", 1.0)
    rotated = header.metadata.get(f"{architecture}.rope.dimension_count", config.head_dim)
    if (kind != "none" and factor != 1.0) or linear != 1.0 or rotated != config.head_dim:
        raise ValueError(
            f"{path} asks for rotary positions that are not ours ({kind} scaling by "
            f"{factor * linear:g}, {rotated} of {config.head_dim} dimensions rotated); full "
            "rotation, unscaled or scaled as Llama 3, can be read"
        )
    if ROPE_FACTORS not in header.tensors:
        return config
    factors = _read_tensor(header, ROPE_FACTORS, path)
    for original in (2**power for power in range(8, 21)):
        scaling = RopeScaling(_shortest(float(factors.max())), 1.0, 4.0, original)
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        expected = _rope_factors(scaled)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-5, atol=0):
            return scaled
    raise ValueError(
        f"the {ROPE_FACTORS} of {path} are not those of Llama 3's scaling (low and high frequency "
        "factors 1 and 4, an original context that is a power of two), which alone can be read"
    )


def _rope_factors(config: LlamaConfig) -> np.ndarray:
    """What the frequencies are divided by."""
    plain = dataclasses.replace(config, rope_scaling=None)
    return (rope_frequencies(plain) / rope_frequencies(config)).astype(np.float32)


def _read_tensor(header: Header, name: str, path: str) -> np.ndarray:
    """One tensor as float32, or as it is if it has 16 bits."""
    tensor, raw = header.tensors[name], header.raw(name)
    kept = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}
    if tensor.type in kept:
        return raw.view(kept[tensor.type])
    try:
        return _by_rows(lambda x: gguf.dequantize(x, tensor.type), raw, tensor.shape, np.float32)
    except NotImplementedError:
        raise ValueError(
            f"tensor {name} of {path} has type {tensor.type.name}, which the installed gguf "
            "package cannot dequantise: requantise the file, to Q8_0 say"
        ) from None


def _by_rows(
    function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    """`function` on some megabytes of rows at a time: the package's loop holds the result twice."""
    out = np.empty(shape, dtype)
    if x.ndim < 2:
        out[...] = function(x)
        return out
    step = max(1, 2**20 // shape[-1])
    for start in range(0, shape[0], step):
        out[start : start + step] = function(x[start : start + step])
    return out


# ---- writing ----------------------------------------------------------------------------------


def write_gguf(model: Model, path: str, *, dtype: str = "f32") -> None:
    """Write `model` to `path`, tensor by tensor; a file that is there is replaced at the end.

    `dtype` is f32, f16, bf16, q8_0 or q4_0, for the matrices: norms and biases are always float32.
    Under q4_0 the output head (or the tied embedding) is Q8_0, where llama.cpp writes Q6_K; rows
    that are not a multiple of 32 are F16, as llama.cpp has it. All processes must call this; the
    first one writes.
    """
    if dtype not in WRITABLE:
        raise ValueError(f"cannot write GGUF of type {dtype!r}: give one of {', '.join(WRITABLE)}")
    config = model.config
    architecture = _architecture(config)
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in _metadata(model, architecture, dtype).items():
        _add(writer, key, value)
    types = {}
    for name, shape in _shapes(config, architecture).items():
        types[name] = _type_of(name, shape, config, dtype)
        block, block_size = gguf.GGML_QUANT_SIZES[types[name]]
        size = math.prod(shape) // block * block_size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, types[name])
    if jax.process_index() == 0:
        _write_file(writer, model, path, types)
    else:
        for _ in foreign_tensors(model, TABLES[architecture]):
            pass


def _write_file(writer: gguf.GGUFWriter, model: Model, path: str, types: dict[str, Type]) -> None:
    """Under another name first, so that `path` is never half a file."""
    partial = f"{path}.partial"
    try:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, x in _tensors(model, writer.arch):
                writer.write_tensor_data(_encode(x, types[name], name))
        finally:
            writer.close()  # flushes, so it too may find the disk full
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}; free room or give another path") from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _architecture(config: LlamaConfig) -> str:
    """`qwen2` for a model with biases, if it can say it all; `llama` takes biases too."""
    window = config.attention.sliding_window
    if window is not None and window < config.max_seq_len:
        raise ValueError(
            f"GGUF's llama architecture has no sliding window, and this model has one of {window} "
            f"tokens under a context of {config.max_seq_len}: set max_seq_len to {window} to export"
        )
    plain = config.num_heads * config.head_dim == config.d_model and config.rope_scaling is None
    return "qwen2" if config.qkv_bias and plain else "llama"


def _shapes(config: LlamaConfig, architecture: str) -> dict[str, tuple[int, ...]]:
    shapes = foreign_shapes(TABLES[architecture], config)
    if config.rope_scaling is not None:
        shapes[ROPE_FACTORS] = (config.head_dim // 2,)
    return shapes


def _tensors(model: Model, architecture: str):
    yield from foreign_tensors(model, TABLES[architecture])
    if model.config.rope_scaling is not None:
        yield ROPE_FACTORS, _rope_factors(model.config)


def _type_of(name: str, shape: tuple[int, ...], config: LlamaConfig, dtype: str) -> Type:
    wanted = WRITABLE[dtype][0]
    head = "token_embd.weight" if config.tie_embeddings else "output.weight"
    if len(shape) == 1:
        return Type.F32
    if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return Type.F16
    return Type.Q8_0 if wanted == Type.Q4_0 and name == head else wanted


def _encode(x: np.ndarray, type: Type, name: str) -> np.ndarray:
    x = np.ascontiguousarray(x)
    if type == Type.F32:
        return x.astype(np.float32, copy=False)
    if type == Type.BF16:
        return x.astype(ml_dtypes.bfloat16)
    if type == Type.F16:
        if np.abs(x).max() > np.finfo(np.float16).max:
            raise ValueError(f"{name} has values beyond float16's 65504: write f32, bf16 or q8_0")
        return x.astype(np.float16)
    block, size = gguf.GGML_QUANT_SIZES[type]
    shape = (*x.shape[:-1], x.shape[-1] // block * size)
    return _by_rows(
        lambda rows: gguf.quantize(rows.astype(np.float32, copy=False), type), x, shape, np.uint8
    )


def _metadata(model: Model, architecture: str, dtype: str) -> dict[str, Any]:
    config = model.config
    shape = {
        "block_count": config.num_layers,
        "context_length": config.max_seq_len,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    general = {
        "general.type": "model",
        "general.file_type": int(WRITABLE[dtype][1]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    tokens = tokenizer_to_metadata(model.tokenizer, vocab_size=config.vocab_size)
    if model.chat_template:
        tokens["tokenizer.chat_template"] = model.chat_template
    if model.tokenizer:
        others = [i for i in model.stop_ids if i != model.tokenizer.eos_id]
        tokens |= dict(zip(STOPS[1:], others, strict=False))
    return general | {f"{architecture}.{key}": value for key, value in shape.items()} | tokens


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)
