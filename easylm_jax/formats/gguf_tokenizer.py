r"""The tokenizer inside a GGUF file: `tokenizer.ggml.*` metadata to a `Tokenizer` and back.

Two kinds exist in models that we read: "gpt2", a byte-level BPE whose rule for cutting text into
words is only named (`tokenizer.ggml.pre`), and "llama", a SentencePiece BPE. The ids are
llama.cpp's, exactly, so a `pre` that is not in the table below is refused: guessing one gives a
tokenizer that is wrong near digits or spaces and never says so. `gguf.py` is the only caller.
"""

import json
from collections.abc import Mapping
from typing import Any

from gguf import TokenType
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from easylm_jax.text.tokenizer import (
    BYTE_LEVEL,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

# ---- how words are cut ------------------------------------------------------------------------

# Each pattern cuts the pieces that the one before has left (llama.cpp, src/llama-vocab.cpp).
_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # as Hugging Face writes it
_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_PATTERNS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "tekken": (_TEKKEN,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# Other names under which llama.cpp does the same. The first ones are what we write.
_SAME = {
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "a.x-4.0", "mellum", "exaone4"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "dbrx": ("smaug-bpe",),
    "qwen2": ("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open", "kormo"),
}
_KNOWN = {name: name for name in _PATTERNS} | {o: n for n, others in _SAME.items() for o in others}
_WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is a piece needs no merges; and BOS is on


def _split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def _patterns_of(step: dict[str, Any] | None) -> tuple[str | None, ...]:
    """The cuts of a `tokenizer.json`'s pre_tokenizer; None among them for one that is not such."""
    match step:
        case {"type": "Sequence", "pretokenizers": [*steps, {"behavior": "Removed"}]}:
            return _patterns_of({"type": "Sequence", "pretokenizers": steps})  # see `_byte_level`
        case {"type": "Sequence", "pretokenizers": steps}:
            return tuple(pattern for one in steps for pattern in _patterns_of(one))
        case {"type": "Digits", "individual_digits": True}:
            return (r"\p{N}",)
        case {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}:
            return (p.replace(_ANY_CASE, _CONTRACTION),)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return ()
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return (_GPT2,)
    return (None,)


_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # their names in keys


# ---- reading ----------------------------------------------------------------------------------


def tokenizer_of(metadata: Mapping[str, Any], *, name: str) -> Tokenizer:
    """The tokenizer of a file that has one; `name` is the file, for messages."""
    kind = _needed(metadata, "model", name)
    if kind == "gpt2":
        return _byte_level(metadata, name)
    if kind == "llama":
        return _sentencepiece(metadata, name)
    raise ValueError(
        f"{name} has a tokenizer of kind {kind!r}; gpt2 (byte-level BPE) and llama (SentencePiece "
        "BPE) can be read"
    )


def _needed(metadata: Mapping[str, Any], key: str, name: str) -> Any:
    if (key := f"tokenizer.ggml.{key}") not in metadata:
        raise ValueError(f"{name} has no metadata key {key}: convert it again with llama.cpp")
    return metadata[key]


def _pieces(metadata: Mapping[str, Any], name: str) -> tuple[list[str], list[int]]:
    """Pieces and their types, without the unused ones that only pad the embedding."""
    pieces = _needed(metadata, "tokens", name)
    types = metadata.get("tokenizer.ggml.token_type", [int(TokenType.NORMAL)] * len(pieces))
    size = len(pieces)
    while size and types[size - 1] == TokenType.UNUSED:
        size -= 1
    if len(set(pieces[:size])) < size:
        raise ValueError(f"the vocabulary of {name} has a piece twice: it cannot be a tokenizer")
    return pieces[:size], types[:size]


def _special_ids(metadata: Mapping[str, Any], size: int) -> dict[str, int]:
    """The special tokens that the file names: "bos" -> its id. Those outside it count as none."""
    ids = {which: metadata.get(f"tokenizer.ggml.{key}_token_id") for which, key in _SPECIAL.items()}
    return {which: i for which, i in ids.items() if i is not None and i < size}


def _byte_level(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    pieces, types = _pieces(metadata, name)
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _KNOWN:
        raise ValueError(
            f"{name} cuts words by the rule {pre!r} (tokenizer.ggml.pre), which is not known here; "
            f"known are {', '.join(_KNOWN)}"
        )
    pre = _KNOWN[pre]
    steps = [*map(_split, _PATTERNS[pre]), _BYTE_LEVEL]
    # Bytes that no piece spells (SmolLM2 has 21) stand for nothing, and no merge may span the gap.
    if missing := sorted({*BYTE_LEVEL} - {*pieces}):
        steps.append(_split("|".join(missing), "Removed"))
    plain = (TokenType.NORMAL, TokenType.BYTE)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, piece, special=kind != TokenType.USER_DEFINED)
            for i, (piece, kind) in enumerate(zip(pieces, types, strict=True))
            if kind not in plain
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [merge.split(" ", 1) for merge in _needed(metadata, "merges", name)],
        },
    }
    special = _special_ids(metadata, len(pieces))
    config = {f"{which}_token": pieces[i] for which, i in special.items()}
    config["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", pre in _WHOLE_WORDS)
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    content, config = (json.dumps(x, ensure_ascii=False).encode() for x in (content, config))
    return HuggingFaceTokenizer(content, config, name=name)


def _added(i: int, piece: str, *, special: bool) -> dict[str, Any]:
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": piece, **options, "special": special}


def _sentencepiece(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    pieces, types = _pieces(metadata, name)
    scores = _needed(metadata, "scores", name)
    special = {"bos": 1, "eos": 2, "unk": 0} | _special_ids(metadata, len(pieces))
    config = {f"{which}_token": pieces[special[which]] for which in ("bos", "eos")}
    config["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", True)
    # SentencePiece wants one unknown piece; older files call it control and the padding unknown.
    types = [int(TokenType.UNUSED) if kind == TokenType.UNKNOWN else kind for kind in types]
    types[special["unk"]] = int(TokenType.UNKNOWN)
    proto = sentencepiece_proto.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=False):
        proto.pieces.add(piece=piece, score=score, type=kind)  # the numbers of the types agree
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = sentencepiece_proto.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = TokenType.BYTE in types
    trainer.pad_id = -1
    for which, i in special.items():
        setattr(trainer, f"{which}_id", i)
        setattr(trainer, f"{which}_piece", pieces[i])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    config = json.dumps(config, ensure_ascii=False).encode()
    return SentencePieceTokenizer(proto.SerializeToString(), config, name=name)


# ---- writing ----------------------------------------------------------------------------------


def tokenizer_to_metadata(tokenizer: Tokenizer | None, *, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.ggml.*` keys. Ids beyond the tokenizer's own are padded with unused pieces."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    files = tokenizer.files()
    if isinstance(tokenizer, ByteTokenizer):
        keys = _from_bytes()
    elif "tokenizer.json" in files:
        keys = _from_tokenizer_json(
            json.loads(files["tokenizer.json"]),
            json.loads(files.get("tokenizer_config.json", "{}")),
        )
    else:
        keys = _from_sentencepiece(files["tokenizer.model"])
    pieces, types = keys["tokens"], keys["token_type"]
    if len(pieces) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(pieces)} pieces and the model's embedding {vocab_size} rows: "
            "export the tokenizer that the model was trained with"
        )
    padding = range(len(pieces), vocab_size)
    keys["tokens"] = pieces + [f"[PAD{i}]" for i in padding]
    keys["token_type"] = types + [int(TokenType.UNUSED)] * len(padding)
    if "scores" in keys:
        keys["scores"] = keys["scores"] + [-1000.0] * len(padding)
    keys["eos_token_id"] = tokenizer.eos_id
    keys["add_bos_token"] = tokenizer.add_bos
    if tokenizer.bos_id is not None:
        keys["bos_token_id"] = tokenizer.bos_id
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _from_tokenizer_json(content: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
    """`beside` is the `tokenizer_config.json`."""
    model, patterns = content["model"], _patterns_of(content["pre_tokenizer"])
    whole_words = model.get("ignore_merges", False)
    names = [
        name
        for name, known in _PATTERNS.items()
        if known == patterns and whole_words == (name in _WHOLE_WORDS)
    ]
    # llama.cpp knows no normalisers; for Qwen2's NFC its own converter looks away too.
    normalizer = (content["normalizer"] or {"type": "NFC"})["type"]
    if model["type"] != "BPE" or not names or normalizer != "NFC":
        raise ValueError(
            "this tokenizer.json cannot be written to GGUF: its model, normalizer or pre_tokenizer "
            f"is none that llama.cpp names ({', '.join(_PATTERNS)}); for a Llama 2 tokenizer give "
            "tokenizer.model instead"
        )
    vocab = model["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    by_id = {i: piece for piece, i in vocab.items()}
    types = dict.fromkeys(by_id, int(TokenType.NORMAL))
    for token in content["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        types[token["id"]] = int(kind)
    ids = range(max(by_id) + 1)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    said = {key: beside.get(f"{which}_token") for which, key in _SPECIAL.items()}
    spelled = {key: s["content"] if isinstance(s, dict) else s for key, s in said.items() if s}
    return {f"{key}_token_id": vocab[s] for key, s in spelled.items() if s in vocab} | {
        "model": "gpt2",
        "pre": names[0],
        "tokens": [by_id.get(i, f"[PAD{i}]") for i in ids],
        "token_type": [types.get(i, int(TokenType.UNUSED)) for i in ids],
        "merges": merges,
    }


def _from_sentencepiece(content: bytes) -> dict[str, Any]:
    proto = sentencepiece_proto.ModelProto.FromString(content)
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != sentencepiece_proto.TrainerSpec.BPE:
        raise ValueError(
            "this SentencePiece model is not of type BPE, and llama.cpp reads no other: train one "
            "with model_type=bpe"
        )
    if normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap:
        raise ValueError(
            "this SentencePiece model normalises its text, which llama.cpp does not: train one "
            "with the identity normaliser and remove_extra_whitespaces=false"
        )
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": [int(piece.type) for piece in proto.pieces],
        "add_space_prefix": normalizer.add_dummy_prefix,
    }


def _from_bytes() -> dict[str, Any]:
    """The byte tokenizer as a BPE; llama.cpp wants a merge, so there is one that never happens."""
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["<s></s>", "<s>", "</s>", *BYTE_LEVEL],
        "token_type": [int(TokenType.CONTROL)] * 3 + [int(TokenType.NORMAL)] * 256,
        "merges": ["<s> </s>"],
    }
