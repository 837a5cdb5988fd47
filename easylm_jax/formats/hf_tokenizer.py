"""What transformers needs of a tokenizer: `tokenizer_config.json`, and SentencePiece made JSON.

transformers 5 loads a lone `tokenizer.model` without its leading space under some families, so
LLaMA's kind is also written as the `tokenizer.json` that gives the same ids. (To a model of type
qwen2 transformers 5 gives Qwen2's way of splitting text whatever the files say: another tokenizer
has other ids there.) Called by `hf.py`.
"""

import json
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, processors

from easylm_jax.text.tokenizer import SPACE, Tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name -> content. Our tokenizer of bytes has no form that transformers knows."""
    files = tokenizer.files()
    if "tokenizer.model" in files and (converted := _as_tokenizer_json(tokenizer)):
        files["tokenizer.json"] = converted
    if "tokenizer.bytes" not in files:
        came_with = json.loads(files.get("tokenizer_config.json", b"{}"))
        said = json.dumps(_tokenizer_config(tokenizer) | came_with, indent=2, ensure_ascii=False)
        files["tokenizer_config.json"] = said.encode()
    return files


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    spelled = {i: piece for piece, i in tokenizer.specials().items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spelled.get(tokenizer.bos_id),
        "eos_token": spelled.get(tokenizer.eos_id),
        "add_bos_token": tokenizer.add_bos,
    }


def _as_tokenizer_json(tokenizer: Tokenizer) -> bytes | None:
    """A SentencePiece BPE as LLaMA's; None for another kind, which keeps its `tokenizer.model`."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.files()["tokenizer.model"])
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    changes_text = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    if trainer.model_type != trainer.BPE or changes_text:
        return None
    unknown = proto.pieces[trainer.unk_id].piece
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    merges = []  # every way to make a piece of two, the best score first
    for piece in normal:
        halves = [(piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece))]
        known = [(l, r) for l, r in halves if l in vocab and r in vocab]
        merges += [(-piece.score, vocab[l], vocab[r], l, r) for l, r in known]
    model = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            [(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    prefix = [normalizers.Prepend(SPACE)] if normalizer.add_dummy_prefix else []
    model.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*to_text, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    specials = {unknown: trainer.unk_id} | tokenizer.specials()
    model.add_special_tokens(sorted(specials, key=specials.get))
    others = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED and p.piece not in specials]
    model.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in others])
    if tokenizer.add_bos:
        bos = proto.pieces[tokenizer.bos_id].piece
        model.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    return model.to_str().encode()
