"""Meta's folders: `params.json` beside `consolidated.NN.pth`, LLaMA 1 to 3.2 (text models).

Large models are cut for tensor parallelism, one file for each rank, and each matrix is put together
again along the dim of `CUT`. `params.json` leaves out what Meta's code had as defaults and what
depends on the release; `_read_config` says how that is told. Called by the loader and converter.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from easylm_jax.formats.foreign import Foreign, Model, foreign_tensors
from easylm_jax.formats.names import META
from easylm_jax.formats.torch_file import LazyTensor, open_torch_file, write_torch_file
from easylm_jax.models.llama import FloatName, LlamaConfig, RopeScaling
from easylm_jax.text.tokenizer import Tokenizer, load_tokenizer

# The dim of [out, in] along which ranks split a matrix; norms are the same in every file. The
# embedding is cut along its width in LLaMA 1 and 2, along the vocabulary in Llama 3.
CUT = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
ROPE_FREQS = r"^rope\.freqs$"  # a table in LLaMA 1's files, computed anew by everybody


def is_meta(path: str) -> bool:
    """Whether `path` is a folder with `params.json` and `consolidated.*.pth`."""
    folder = Path(path)
    return (folder / "params.json").is_file() and any(folder.glob("consolidated.*.pth"))


def open_meta(path: str) -> Foreign:
    """The model in the folder `path`, with the `tokenizer.model` in it or in its parent."""
    params = _read_params(Path(path) / "params.json")
    shards = [open_torch_file(str(file)) for file in sorted(Path(path).glob("consolidated.*.pth"))]
    _check_shards(shards, params["dim"], path)
    shapes = {name: _whole_shape(name, shards, params["dim"]) for name in shards[0]}
    config = _read_config(params, shapes, tied=_is_tied(shards[0], params))

    def read(name: str) -> np.ndarray:
        parts = [shard[name].read() for shard in shards]
        dim = _cut_dim(name, shards[0][name].shape, params["dim"])
        return parts[0] if dim is None else np.concatenate(parts, axis=dim)

    return Foreign(
        path=path,
        config=config,
        table=META,
        shapes=shapes,
        read=read,
        tokenizer=_tokenizer(Path(path)),
        ignored=(ROPE_FREQS, rf"^{OUTPUT}$") if config.tie_embeddings else (ROPE_FREQS,),
    )


def _read_params(path: Path) -> dict[str, Any]:
    try:
        params = json.loads(path.read_text())
        needed = {"dim", "n_layers", "n_heads", "norm_eps", "multiple_of"}
        missing = {key for key in needed if not isinstance(params.get(key), (int, float))}
    except (ValueError, AttributeError):
        missing = {"a JSON object"}
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: get Meta's params.json again")
    return params


def _check_shards(shards: list[dict[str, LazyTensor]], d_model: int, path: str) -> None:
    """As many files as the width of the query matrix is cut into, each with the same tensors."""
    query = "layers.0.attention.wq.weight"
    if query not in shards[0] or EMBEDDING not in shards[0] or not any(shards[0][query].shape[:1]):
        raise ValueError(f"consolidated.*.pth in {path} lacks {query}: expected LLaMA weights")
    expected = d_model // shards[0][query].shape[0]
    if len(shards) != expected:
        raise ValueError(
            f"{path} holds {len(shards)} consolidated.*.pth of a model cut into {expected}: put "
            "all of them there"
        )
    for i, shard in enumerate(shards):
        if differing := set(shard) ^ set(shards[0]):
            raise ValueError(
                f"file {i} of consolidated.*.pth in {path} has other tensors than file 0, such as "
                f"{min(differing)}: get it again"
            )


def _cut_dim(name: str, shape: tuple[int, ...], d_model: int) -> int | None:
    if name == EMBEDDING:
        dim = 0 if shape[1:] == (d_model,) else 1
    else:
        dim = CUT.get(name.rpartition(".")[0].rpartition(".")[2])
    return dim if dim is not None and dim < len(shape) else None  # wrong shapes are told later


def _whole_shape(name: str, shards: list[dict[str, LazyTensor]], d_model: int) -> tuple[int, ...]:
    shape = list(shards[0][name].shape)
    if (dim := _cut_dim(name, shards[0][name].shape, d_model)) is not None:
        shape[dim] = sum(shard[name].shape[dim] for shard in shards)
    return tuple(shape)


def _is_tied(first: dict[str, LazyTensor], params: dict[str, Any]) -> bool:
    """Whether the head is the embedding: absent, the same place in the file, or a copy.

    Llama 3.2's small models are tied and may come with a copy, so those two are compared.
    """
    if OUTPUT not in first or first[OUTPUT] == first[EMBEDDING]:
        return True
    return _is_small_llama32(params) and np.array_equal(
        first[OUTPUT].read(), first[EMBEDDING].read()
    )


def _is_small_llama32(params: dict[str, Any]) -> bool:
    """1B and 3B: the only text models with scaled positions that are narrower than 8B."""
    return bool(params.get("use_scaled_rope")) and params["dim"] < 4096


def _read_config(
    params: dict[str, Any], shapes: dict[str, tuple[int, ...]], *, tied: bool
) -> LlamaConfig:
    """The feed-forward width is Meta's formula; a file that differs is found by its shapes."""
    d_model, num_heads = params["dim"], params["n_heads"]
    vocab_size = params.get("vocab_size", -1)
    return LlamaConfig(
        vocab_size=vocab_size if vocab_size > 0 else shapes[EMBEDDING][0],
        d_model=d_model,
        num_layers=params["n_layers"],
        num_heads=num_heads,
        num_kv_heads=params.get("n_kv_heads") or num_heads,
        head_dim=d_model // num_heads,
        d_ff=_feed_forward(d_model, params["multiple_of"], params.get("ffn_dim_multiplier")),
        max_seq_len=_max_seq_len(params),
        norm_eps=float(params["norm_eps"]),
        rope_theta=float(params.get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(params),
        tie_embeddings=tied,
    )


def _feed_forward(d_model: int, multiple_of: int, multiplier: float | None) -> int:
    width = int(2 * (4 * d_model) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _rope_scaling(params: dict[str, Any]) -> RopeScaling | None:
    """`use_scaled_rope` is a mere flag. Llama 3.1 and 3.3 were trained with factor 8, the 3.2 text
    models with 32, although Meta's code says 8 for all (meta-llama/llama-models #166, #241)."""
    if not params.get("use_scaled_rope"):
        return None
    return RopeScaling(factor=32.0 if _is_small_llama32(params) else 8.0)


def _max_seq_len(params: dict[str, Any]) -> int:
    """The context of the release, which is no key of the file.

    LLaMA 1 is told from 2 by its epsilon of 1e-6, save 65B: as wide as Llama 2's 70B, without
    grouped heads. Code Llama has a rope_theta of 1e6.
    """
    theta = params.get("rope_theta", 10_000.0)
    if params.get("use_scaled_rope"):
        return 131_072
    if theta > 10_000.0:
        return 16_384 if theta >= 1e6 else 8192
    is_65b = params["dim"] == 8192 and not params.get("n_kv_heads")
    return 2048 if params["norm_eps"] < 5e-6 or is_65b else 4096


def _tokenizer(folder: Path) -> Callable[[], Tokenizer] | None:
    files = (folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model")
    found = next((file for file in files if file.is_file()), None)
    return found and (lambda: load_tokenizer(str(found)))


def write_meta(model: Model, folder: str, *, dtype: FloatName = "float32") -> None:
    """`params.json`, one `consolidated.00.pth` and the tokenizer, as Meta's code reads them."""
    params = _params_of(model.config)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "params.json").write_text(json.dumps(params) + "\n")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, x in foreign_tensors(model, META):
            yield name, x.astype(dtype, copy=False)

    same = {OUTPUT: EMBEDDING} if model.config.tie_embeddings else {}
    write_torch_file(str(target / "consolidated.00.pth"), tensors(), same=same)
    if model.tokenizer:
        model.tokenizer.save(folder)


def _params_of(config: LlamaConfig) -> dict[str, Any]:
    """`params.json`; ValueError if what it can say is another model."""
    formula = _feed_forward(config.d_model, 1, None)
    params = {
        "dim": config.d_model,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        # The formula rounds up to a multiple: of the width itself, so that it gives just that.
        "multiple_of": config.d_ff,
        "ffn_dim_multiplier": min(1.0, config.d_ff / formula),
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": config.rope_scaling is not None,
    }
    unsaid = {
        "biases on q, k, v": config.qkv_bias,
        "a sliding window": config.attention.sliding_window is not None,
        f"head_dim = {config.head_dim}": config.head_dim * config.num_heads != config.d_model,
        f"{config.rope_scaling}": config.rope_scaling != _rope_scaling(params),
    }
    if found := [what for what, is_so in unsaid.items() if is_so]:
        raise ValueError(
            f"Meta's format cannot state {', '.join(found)}: convert to hf or gguf instead"
        )
    return params
