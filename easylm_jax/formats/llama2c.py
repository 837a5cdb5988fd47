"""llama2.c's legacy `.bin` files (Karpathy 2023): the stories models, and their tokenizer files.

A header of seven int32, then float32 tensors, each stacked over the layers. Matrices are [out, in]
and rotation is Meta's, so the names of `names.META` serve. llama2.c's later versioned files (magic
"ak42") are not read. Called by the loader and the converter.
"""

import math
import struct
from pathlib import Path

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from easylm_jax.formats.foreign import Foreign
from easylm_jax.formats.names import META
from easylm_jax.models.llama import LlamaConfig
from easylm_jax.text.tokenizer import SPACE, SentencePieceTokenizer

HEADER = struct.Struct("<7i")
# Not in the header: `model.py` and `run.c` of llama2.c fix them.
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0


def is_llama2c(path: str) -> bool:
    """Whether `path` is a file exactly as long as the sizes in its header ask for."""
    if not Path(path).is_file() or not path.endswith(".bin"):
        return False
    try:
        return _num_bytes(_read_config(path)) == Path(path).stat().st_size
    except ValueError:
        return False


def open_llama2c(path: str) -> Foreign:
    """The model in `path`, with the tokenizer `tokN.bin` or `tokenizer.bin` that lies beside it."""
    config = _read_config(path)
    size = Path(path).stat().st_size
    if size != _num_bytes(config):
        raise ValueError(
            f"{path} is not a whole llama2.c file: its header asks for {_num_bytes(config)} bytes, "
            f"got {size}"
        )
    offsets, shapes = {}, {}
    offset = HEADER.size
    for name, shape in _layout(config):
        for layer in range(shape[0]) if "{layer}" in name else [None]:
            tensor = name.format(layer=layer)
            offsets[tensor] = offset
            shapes[tensor] = shape if layer is None else shape[1:]
            offset += 4 * math.prod(shapes[tensor])
    shapes.pop("rope")

    def read(name: str) -> np.ndarray:
        return np.memmap(path, "<f4", "r", offsets[name], shapes[name]).view(np.ndarray)

    beside = [
        Path(path).parent / f"tok{config.vocab_size}.bin",
        Path(path).parent / "tokenizer.bin",
    ]
    found = next((file for file in beside if file.exists()), None)
    return Foreign(
        path=path,
        config=config,
        table=META,
        shapes=shapes,
        read=read,
        tokenizer=found and (lambda: read_tokenizer(str(found), config.vocab_size)),
    )


def _read_config(path: str) -> LlamaConfig:
    """The header. A negative vocabulary size says that the output matrix is not the embedding."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    sizes = HEADER.unpack(header) if len(header) == HEADER.size else (0,) * 7
    d_model, d_ff, num_layers, num_heads, num_kv_heads, vocab_size, max_seq_len = sizes
    plausible = all(0 < size < 2**24 for size in (*sizes[:5], abs(vocab_size), max_seq_len))
    if not plausible or d_model % num_heads or num_heads % num_kv_heads:
        raise ValueError(f"{path} is no legacy llama2.c file: its header reads {list(sizes)}")
    return LlamaConfig(
        vocab_size=abs(vocab_size),
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=d_model // num_heads,
        d_ff=d_ff,
        max_seq_len=max_seq_len,
        norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        tie_embeddings=vocab_size > 0,
    )


def _layout(config: LlamaConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and stacked shapes in the file's order. `rope` is the cos and sin tables, unused."""
    L, D, F, V = config.num_layers, config.d_model, config.d_ff, config.vocab_size
    kv = config.num_kv_heads * config.head_dim
    layer = "layers.{layer}."
    output = [] if config.tie_embeddings else [("output.weight", (V, D))]
    return [
        ("tok_embeddings.weight", (V, D)),
        (layer + "attention_norm.weight", (L, D)),
        (layer + "attention.wq.weight", (L, D, D)),
        (layer + "attention.wk.weight", (L, kv, D)),
        (layer + "attention.wv.weight", (L, kv, D)),
        (layer + "attention.wo.weight", (L, D, D)),
        (layer + "ffn_norm.weight", (L, D)),
        (layer + "feed_forward.w1.weight", (L, F, D)),
        (layer + "feed_forward.w2.weight", (L, D, F)),
        (layer + "feed_forward.w3.weight", (L, F, D)),
        ("norm.weight", (D,)),
        ("rope", (2, config.max_seq_len, config.head_dim // 2)),
        *output,
    ]


def _num_bytes(config: LlamaConfig) -> int:
    return HEADER.size + 4 * sum(math.prod(shape) for _, shape in _layout(config))


def read_tokenizer(path: str, vocab_size: int) -> SentencePieceTokenizer:
    """llama2.c's tokenizer file as the SentencePiece model it was exported from.

    After the longest piece's length, for each piece: score, length, UTF-8 bytes. Ids are LLaMA's:
    0 unknown, 1 BOS, 2 EOS, then 256 bytes.
    """
    content = Path(path).read_bytes()
    offset, pieces = 4, []
    try:
        while offset < len(content):
            score, length = struct.unpack_from("<fi", content, offset)
            piece = content[offset + 8 : offset + 8 + length].decode()
            pieces.append((piece.replace(" ", SPACE), score))
            offset += 8 + length
    except (struct.error, UnicodeDecodeError):
        offset = -1
    if offset != len(content) or len(pieces) != vocab_size:
        raise ValueError(
            f"{path} is no llama2.c tokenizer of {vocab_size} pieces, as the model beside it has: "
            f"{len(pieces)} could be read"
        )
    return SentencePieceTokenizer(_model_proto(pieces), name=path)


def _model_proto(pieces: list[tuple[str, float]]) -> bytes:
    """A BPE model with LLaMA's normaliser: a space before the text, no other change."""
    model = sentencepiece_model.ModelProto()
    kinds = sentencepiece_model.ModelProto.SentencePiece
    special = {0: ("<unk>", kinds.UNKNOWN), 1: ("<s>", kinds.CONTROL), 2: ("</s>", kinds.CONTROL)}
    for i, (piece, score) in enumerate(pieces):
        piece, kind = special.get(i, (piece, kinds.BYTE if i < 3 + 256 else kinds.NORMAL))
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece_model.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString()
