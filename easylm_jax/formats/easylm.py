"""EasyLM's checkpoints: the stream of tensors it writes, and flax's msgpack of a whole tree.

A stream is msgpack objects one after the other, each (path of the parameter, flax's bytes of the
array). Opening reads the headers alone and notes where the numbers lie, so nothing big is held. A
path may carry EasyLM's prefix, as `params::PATH`; what is in the file is found out from its content
all the same, and optimiser state is passed over. Our own output is a folder with `streaming_params`
beside a `config.json` that says what the file cannot. Called by the loader and the converter.
"""

import dataclasses
import json
import math
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import msgpack
import numpy as np

from easylm_jax.formats.foreign import Foreign, Model, foreign_shapes, foreign_tensors
from easylm_jax.formats.names import EASYLM
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import FloatName, LlamaConfig, RopeScaling
from easylm_jax.models.presets import PRESETS
from easylm_jax.text.tokenizer import load_tokenizer

PREFIXES = ("params", "trainstate_params", "trainstate", "flax_params")
STREAM_NAME = "streaming_params"  # EasyLM's own name of it
EMBEDDING, HEAD = "transformer/wte/embedding", "lm_head/kernel"
# What stands before a parameter's path, depending on which state was saved.
PARAMETER = re.compile(r"^(?:params/)*((?:transformer|lm_head)/.*)$")

# What decoding other bytes than msgpack can end in.
DAMAGE = (IndexError, KeyError, RecursionError, TypeError, ValueError, struct.error)


class _Stored(NamedTuple):
    """An array in a file: where each chunk of it begins, and how many bytes it has."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[tuple[int, int], ...]


def is_easylm(path: str) -> bool:
    """Whether `path` has a prefix of EasyLM's, or begins as a stream or a tree of parameters."""
    if "::" in path:
        return True
    file = _file_of(path)
    if not file.is_file() or file.stat().st_size < 32:
        return False
    with open(file, "rb") as opened:
        start = opened.read(256)
    try:
        is_stream = start[0] == 0x92
        key = _decode(start, 1)[0] if start[0] < 0x90 or is_stream else None
    except DAMAGE:
        return False
    known = {"params", "transformer", "lm_head"}
    if is_stream:
        return isinstance(key, list) and bool(key) and all(isinstance(k, str) for k in key)
    return isinstance(key, str) and key in known


def open_easylm(path: str, config: LlamaConfig | None = None) -> Foreign:
    """The model in the stream, msgpack or folder `path`.

    The file has shapes and no configuration. That is `config`, else the `config.json` beside the
    file, else the one published model of just these shapes.
    """
    file = _file_of(path)
    stored = _index(str(file))
    shapes = {name: x.shape for name, x in stored.items()}
    config = config or _config_beside(file) or _matching_preset(shapes, path)
    if config.tie_embeddings and not _is_tied(str(file), stored):
        config = dataclasses.replace(config, tie_embeddings=False)
    tokenizer = file.parent / "tokenizer"
    return Foreign(
        path=path,
        config=config,
        table=EASYLM,
        shapes=shapes,
        read=lambda name: _read(str(file), stored[name]),
        tokenizer=(lambda: load_tokenizer(str(tokenizer))) if tokenizer.is_dir() else None,
        ignored=(f"^{HEAD}$",) if config.tie_embeddings else (),
    )


def _is_tied(file: str, stored: dict[str, _Stored]) -> bool:
    """Whether a head that is there is a copy of the embedding, as EasyLM's code needs one."""
    if HEAD not in stored or EMBEDDING not in stored:
        return True
    return np.array_equal(_read(file, stored[HEAD]), _read(file, stored[EMBEDDING]).T)


def _file_of(path: str) -> Path:
    """The file that a path with or without prefix means; in a folder, the stream."""
    prefix, separator, rest = path.rpartition("::")
    if separator and prefix not in PREFIXES:
        raise ValueError(f"{path} has an unknown prefix; there are {':: '.join(PREFIXES)}::")
    file = Path(rest)
    return file / STREAM_NAME if (file / STREAM_NAME).is_file() else file


def _config_beside(file: Path) -> LlamaConfig | None:
    """The section "model" of our `config.json`."""
    beside = file.parent / "config.json"
    said = json.loads(beside.read_text()) if beside.is_file() else {}
    if "model" not in said:
        return None
    nested = {"attention": AttentionConfig, "rope_scaling": RopeScaling}
    fields = {
        name: nested[name](**value) if name in nested and value else value
        for name, value in said["model"].items()
    }
    return LlamaConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _matching_preset(shapes: dict[str, tuple[int, ...]], path: str) -> LlamaConfig:
    found = [
        name
        for name, preset in PRESETS.items()
        if shapes.get(EMBEDDING) == (preset.vocab_size, preset.d_model)
        and foreign_shapes(EASYLM, preset) == shapes
    ]
    if len(found) == 1:
        return PRESETS[found[0]]
    which = f"those of {', '.join(found)}" if found else "of no published model"
    raise ValueError(
        f"{path} does not say what model it holds and its shapes are {which}: pass --model=PRESET, "
        'or put a config.json with the section "model" beside it'
    )


# ---- reading ------------------------------------------------------------------------------------


def _index(path: str) -> dict[str, _Stored]:
    """Name -> place of every parameter in the file."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            found = {"/".join(keys): x for keys, x in _arrays(content)}
        except DAMAGE:
            raise ValueError(
                f"{path} is no whole EasyLM stream or flax msgpack: it ends early or is damaged"
            ) from None
    matches = {PARAMETER.match(name): x for name, x in found.items()}
    stored = {match[1]: x for match, x in matches.items() if match}
    if not stored:
        raise ValueError(f"{path} holds no LLaMA parameters: expected {EMBEDDING} and others")
    return stored


def _arrays(content: mmap.mmap) -> Iterator[tuple[list[str], _Stored]]:
    """Path and place of every array: of each record of a stream, or of the one tree."""
    end = 0
    while end < len(content):
        top, end = _decode(content, end)
        if isinstance(top, dict):
            yield from _leaves(content, top, [])
        else:
            keys, value = top
            yield from _leaves(content, _decode(content, value.start)[0], keys)


def _leaves(content: mmap.mmap, tree: Any, keys: list[str]) -> Iterator[tuple[list[str], _Stored]]:
    if isinstance(tree, _Bytes) and tree.kind == flax.serialization._MsgpackExtType.ndarray:
        yield keys, _stored(content, [tree])
    elif isinstance(tree, dict) and "__msgpack_chunked_array__" in tree:
        x = _stored(content, list(tree["chunks"].values()))
        yield keys, x._replace(shape=tuple(tree["shape"].values()))
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(content, value, [*keys, key])


def _stored(content: mmap.mmap, arrays: list["_Bytes"]) -> _Stored:
    """flax writes an array as an extension whose bytes are msgpack (shape, type, numbers)."""
    parts = [_decode(content, x.start)[0] for x in arrays]
    shape, dtype, _ = parts[0]
    chunks = tuple((numbers.start, numbers.length) for _, _, numbers in parts)
    return _Stored(tuple(shape), np.dtype(dtype), chunks)


def _read(path: str, x: _Stored) -> np.ndarray:
    if not math.prod(x.shape):
        return np.empty(x.shape, x.dtype)
    parts = [np.memmap(path, np.uint8, "r", start, (size,)) for start, size in x.chunks]
    flat = parts[0].view(np.ndarray) if len(parts) == 1 else np.concatenate(parts)
    return flat.view(x.dtype).reshape(x.shape)


# ---- msgpack, without reading what is long ------------------------------------------------------


class _Bytes(NamedTuple):
    """Bytes left in the file. `kind`: the extension type, None for plain ones."""

    kind: int | None
    start: int
    length: int


# First byte -> how its length or number follows (https://github.com/msgpack/msgpack spec.md).
_NUMBERS = {0xCA + i: f">{code}" for i, code in enumerate("fdBHIQbhiq")}
_LENGTHS = {
    **{0xC4 + i: (f">{code}", "bytes") for i, code in enumerate("BHI")},
    **{0xC7 + i: (f">{code}", "extension") for i, code in enumerate("BHI")},
    **{0xD9 + i: (f">{code}", "text") for i, code in enumerate("BHI")},
    **{0xDC + i: (f">{code}", "array") for i, code in enumerate("HI")},
    **{0xDE + i: (f">{code}", "map") for i, code in enumerate("HI")},
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def _decode(content: bytes | mmap.mmap, at: int) -> tuple[Any, int]:
    """The object at `at` with `_Bytes` in place of bytes and extensions, and where it ends."""
    first = content[at]
    at += 1
    if first < 0x80 or first >= 0xE0:
        return first if first < 0x80 else first - 0x100, at
    if first in _CONSTANTS:
        return _CONSTANTS[first], at
    if code := _NUMBERS.get(first):
        return struct.unpack_from(code, content, at)[0], at + struct.calcsize(code)
    if first < 0xC0:
        kind = "map" if first < 0x90 else "array" if first < 0xA0 else "text"
        length = first & (0x1F if kind == "text" else 0x0F)
    elif 0xD4 <= first <= 0xD8:
        kind, length = "extension", 1 << (first - 0xD4)
    else:
        code, kind = _LENGTHS[first]
        (length,) = struct.unpack_from(code, content, at)
        at += struct.calcsize(code)
    return _decode_long(content, at, kind, length)


def _decode_long(content: bytes | mmap.mmap, at: int, kind: str, length: int) -> tuple[Any, int]:
    if kind == "array" or kind == "map":
        items = []
        for _ in range(length if kind == "array" else 2 * length):
            item, at = _decode(content, at)
            items.append(item)
        return (items if kind == "array" else dict(zip(items[::2], items[1::2], strict=True))), at
    start = at + (kind == "extension")
    if start + length > len(content):
        raise ValueError("cut short")
    if kind == "text":
        return content[start : start + length].decode(), start + length
    extension = content[at] if kind == "extension" else None
    return _Bytes(extension, start, length), start + length


# ---- writing ------------------------------------------------------------------------------------


def write_easylm(model: Model, folder: str, *, dtype: FloatName = "float32") -> None:
    """`streaming_params`, for EasyLM's `params::`, with our `config.json` and tokenizer beside it.

    EasyLM has no tied embeddings, so that a tied model gets a head of its own.
    """
    if model.config.qkv_bias:
        raise ValueError("EasyLM's LLaMA has no biases on q, k, v: convert to hf or gguf instead")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config = {"model": dataclasses.asdict(model.config)}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if model.tokenizer:
        model.tokenizer.save(f"{folder}/tokenizer")
    packer = msgpack.Packer()
    with open(target / STREAM_NAME, "wb") as file:
        for name, x in foreign_tensors(model, EASYLM):
            x = np.ascontiguousarray(x, dtype)
            file.write(packer.pack((name.split("/"), flax.serialization.to_bytes(x))))
            if name == EMBEDDING and model.config.tie_embeddings:
                head = flax.serialization.to_bytes(np.ascontiguousarray(x.T))
                file.write(packer.pack((HEAD.split("/"), head)))
