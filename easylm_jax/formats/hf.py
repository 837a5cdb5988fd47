"""Hugging Face folders: `config.json`, weights in safetensors, the tokenizer's files.

Reads one file or shards with an index, and the older `pytorch_model*.bin`; writes what
transformers' Auto classes load. Only headers are read at first, and tensors one by one by plain
reads: pages of a mapped file would count as memory of the process until the last tensor.
Configurations are in `hf_config.py`, tokenizers in `hf_tokenizer.py`.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from easylm_jax.formats.foreign import Foreign, Model, foreign_shapes, foreign_tensors
from easylm_jax.formats.hf_config import config_from_hf, config_to_hf
from easylm_jax.formats.hf_tokenizer import tokenizer_files
from easylm_jax.formats.names import HF
from easylm_jax.formats.torch_file import LazyTensor, open_torch_file
from easylm_jax.text.jinja_template import CHAT_TEMPLATE, read_chat_template
from easylm_jax.text.tokenizer import load_tokenizer

MAX_SHARD_BYTES = 2 * 10**9  # a larger tensor has a shard of its own
TOKENIZER_FILES = ("tokenizer.json", "*.model", "tokenizer.bytes")
INV_FREQ = r"rotary_emb\.inv_freq$"  # a buffer in files of old, which the configuration implies


# ---- reading ------------------------------------------------------------------------------------


def is_hf(path: str) -> bool:
    """Whether `path` is a folder whose `config.json` speaks of a model as Hugging Face does."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return False
    try:
        said = _read_json(folder / "config.json")
    except ValueError:  # `open_hf` shall say what is wrong with it
        return any(folder.glob("*.safetensors"))
    return "model_type" in said or "architectures" in said


def open_hf(path: str) -> Foreign:
    """The model in a folder, its weights still in the files.

    Raises ValueError for another family of models, and for files that are missing or damaged.
    """
    folder = Path(path)
    config_path = folder / "config.json"
    config = config_from_hf(_read_json(config_path), str(config_path))
    tensors = _open_weights(folder)
    if config.qkv_bias and any(name.endswith("o_proj.bias") for name in tensors):
        raise ValueError(
            f"{path} has a bias on the attention output (o_proj.bias), which this model lacks: "
            "only those on q, k and v are known"
        )
    has_tokenizer = any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)
    return Foreign(
        path=path,
        config=config,
        table=HF,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        read=lambda name: tensors[name].read(),
        tokenizer=(lambda: load_tokenizer(path)) if has_tokenizer else None,
        chat_template=read_chat_template(path),
        ignored=(INV_FREQ, r"^lm_head\.weight$") if config.tie_embeddings else (INV_FREQ,),
        stop_ids=_read_stop_ids(folder),
    )


class _Stored(NamedTuple):
    """A tensor in an open safetensors file."""

    file: Any
    name: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


Tensors = dict[str, _Stored] | dict[str, LazyTensor]


def _open_weights(folder: Path) -> Tensors:
    """Every tensor of the folder by name; as transformers, safetensors before `.bin`."""
    kinds: dict[str, Callable[[str], Tensors]] = {
        "model.safetensors": _open_safetensors,
        "pytorch_model.bin": open_torch_file,
    }
    for name, open_file in kinds.items():
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return open_file(str(folder / name))
        if index.exists():
            opened = {}
            for shard in _shards_of(index):
                opened |= open_file(str(shard))
            return opened
    raise ValueError(
        f"{folder} has a config.json and no weights: expected {' or '.join(kinds)}, whole or in "
        "shards with an index"
    )


def _shards_of(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f'{index} has no "weight_map" from tensors to files: get it again')
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise ValueError(f"{index} names {name!r}: expected the plain name of a file beside it")
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise ValueError(
            f"{index} names {len(shards)} files of which {len(missing)} are missing, "
            f"{missing[0]} first: put all of them beside it"
        )
    return shards


def _open_safetensors(path: str) -> dict[str, _Stored]:
    try:
        file = safe_open(path, framework="numpy", backend="pread")
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): get it again") from None
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return {name: _Stored(file, name, shape) for name, shape in shapes.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a JSON object")
    return content


def _read_stop_ids(folder: Path) -> tuple[int, ...]:
    """What `generation_config.json` says, else `config.json`: one id or several."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        found = _read_json(file).get("eos_token_id") if file.exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(i) is int for i in ids):
                raise ValueError(f"{file} has eos_token_id = {found!r}: expected an id or a list")
            return tuple(ids)
    return ()


# ---- writing ------------------------------------------------------------------------------------


def write_hf(model: Model, folder: str, *, dtype: str = "float32") -> None:
    """Write a folder that transformers loads, with the weights in `dtype`.

    Host memory: the tensors of one file, at most `MAX_SHARD_BYTES`. Of several processes all must
    call and the first writes. Transformers has no tokenizer of bytes: that one only we read again.
    """
    target = Path(folder)
    if is_writer := jax.process_index() == 0:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in _small_files(model, dtype).items():
            (target / name).write_bytes(content)
    stream = foreign_tensors(model, HF)
    for file, names in _shard_names(model, dtype).items():
        shard = _take(stream, len(names), dtype)
        if is_writer:
            save_file(shard, target / file, metadata={"format": "pt"})
        del shard  # before the next one is gathered


def _take(
    stream: Iterator[tuple[str, np.ndarray]], count: int, dtype: str
) -> dict[str, np.ndarray]:
    taken = itertools.islice(stream, count)
    return {name: np.ascontiguousarray(x.astype(dtype, copy=False)) for name, x in taken}


def _shard_names(model: Model, dtype: str) -> dict[str, list[str]]:
    """File name -> the tensors in it, in the order of `foreign_tensors`."""
    shards, room = [[]], MAX_SHARD_BYTES
    for name, size in _sizes(model, dtype).items():
        if size > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, 1)
    }


def _sizes(model: Model, dtype: str) -> dict[str, int]:
    """Name -> bytes of each tensor."""
    shapes = foreign_shapes(HF, model.config)
    return {name: math.prod(shape) * np.dtype(dtype).itemsize for name, shape in shapes.items()}


def _small_files(model: Model, dtype: str) -> dict[str, bytes]:
    """File name -> content of everything but the weights."""
    tokenizer, shards = model.tokenizer, _shard_names(model, dtype)
    ids = {"bos_token_id": None, "eos_token_id": None}
    files = {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        files |= tokenizer_files(tokenizer)
    if model.stop_ids:
        ids["eos_token_id"] = model.stop_ids[0] if len(model.stop_ids) == 1 else [*model.stop_ids]
    files["config.json"] = _as_json(config_to_hf(model.config) | {"torch_dtype": dtype} | ids)
    files["generation_config.json"] = _as_json(ids)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        metadata = {"total_size": sum(_sizes(model, dtype).values())}
        index = {"metadata": metadata, "weight_map": weight_map}
        files["model.safetensors.index.json"] = _as_json(index)
    if model.chat_template is not None:
        files[CHAT_TEMPLATE] = model.chat_template.encode()
    return files


def _as_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
