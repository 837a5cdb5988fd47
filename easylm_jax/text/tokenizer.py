"""Tokenizer: text to ids and back, with one face over bytes, SentencePiece and `tokenizer.json`.

What it is not: a chat template or a batcher. `encode` never adds BOS or EOS, and text can never
become a special id: a document that contains the characters `<s>` gets ordinary pieces for them.
Special ids come only from `special_id`, which `example.py` calls for segments marked special.

`token_bytes` makes bits per byte comparable between tokenizers: the bytes of `encode(text)` sum to
`len(text.encode())`. One exception: a SentencePiece model with `add_dummy_prefix` (LLaMA 1 and 2)
puts one space before every non-empty text, so there the sum is one byte more.
"""

import abc
import hashlib
import io
import json
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers
from etils import epath
from jaxtyping import Int

SPACE = "\u2581"  # SentencePiece writes a space as this character

# BOS and EOS of `tokenizer.json` files that come without a `tokenizer_config.json`.
KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]")
KNOWN_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[EOS]")


class Tokenizer(abc.ABC):
    """What the rest of the package knows of a tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str  # sha256 of the tokenizer's content: equal fingerprints give equal ids

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone: no BOS, no EOS, no special ids."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> str:
        """The text of `ids`; special ids stand for no text."""

    @abc.abstractmethod
    def token_bytes(self) -> Int[np.ndarray, "V"]:
        """UTF-8 bytes of text that each id stands for; 0 for special ids."""

    @abc.abstractmethod
    def piece_id(self, piece: str) -> int | None:
        """The id spelled `piece` in the vocabulary, or None."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """File name to content: what `save` writes and `load_tokenizer` reads."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def special_id(self, name: str) -> int:
        """The id of "bos", "eos" or a special token spelled as in the vocabulary."""
        if name in ("bos", "eos"):
            return self.bos_id if name == "bos" else self.eos_id
        found = self.piece_id(name)
        if found is None:
            raise ValueError(
                f"the tokenizer has no special token {name!r}: use one of its vocabulary, "
                '"bos" or "eos"'
            )
        return found

    def save(self, folder: str) -> None:
        """Copy the tokenizer's files into `folder`, from where `load_tokenizer` reads them."""
        target = epath.Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (target / name).write_bytes(content)


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, after 0 (unused), 1 (BOS) and 2 (EOS): needs no training."""

    first_byte = 3
    marker = b"one id per UTF-8 byte\n"

    def __init__(self):
        self.vocab_size, self.bos_id, self.eos_id = 256 + self.first_byte, 1, 2
        self.fingerprint = hashlib.sha256(self.marker).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [byte + self.first_byte for byte in text.encode()]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> str:
        content = bytes(int(i) - self.first_byte for i in ids if i >= self.first_byte)
        return content.decode(errors="replace")

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        return (np.arange(self.vocab_size) >= self.first_byte).astype(np.int32)

    def piece_id(self, piece: str) -> int | None:
        return {"<s>": self.bos_id, "</s>": self.eos_id}.get(piece)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.bytes": self.marker}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `*.model`."""

    def __init__(self, content: bytes, *, name: str):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise ValueError(
                f"{name} is not a SentencePiece model (Llama 3's tokenizer.model is a tiktoken "
                "file): give its tokenizer.json instead"
            ) from None
        self._content = content
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        _check_bos_eos(self.bos_id, self.eos_id, name=name)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_ids = byte_ids if all(map(self._model.is_byte, byte_ids)) else None

    def encode(self, text: str) -> list[int]:
        # A literal U+2581 would be taken for a space: spell it by its bytes.
        if self._space_ids is None or SPACE not in text:
            return self._model.encode(text)
        first, *rest = [self._model.encode(part) for part in text.split(SPACE)]
        return first + [i for part in rest for i in (*self._space_ids, *part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(SPACE in text for text in texts):
            return super().encode_batch(texts)
        return self._model.encode(list(texts))  # in C++ threads

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> str:
        return self._model.decode([int(i) for i in ids])

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        def size(i: int) -> int:
            if self._model.is_byte(i):
                return 1
            if self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i):
                return 0
            return len(self._model.id_to_piece(i).replace(SPACE, " ").encode())

        return np.array([size(i) for i in range(self.vocab_size)], np.int32)

    def piece_id(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)
        return found if self._model.id_to_piece(found) == piece else None

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._content}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, with BOS and EOS from the `tokenizer_config.json` beside it, if any."""

    def __init__(self, content: bytes, config: bytes, *, name: str):
        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the Rust library raises bare Exception
            raise ValueError(f"{name} is not a tokenizer.json: {error}") from None
        self._model.encode_special_tokens = True  # special tokens in a text are plain characters
        self._model.no_truncation()
        self._model.no_padding()
        self._content, self._config = content, config
        self.vocab_size = self._model.get_vocab_size(with_added_tokens=True)
        said = json.loads(config) if config else {}
        self.bos_id = self._named(said.get("bos_token"), KNOWN_BOS)
        self.eos_id = self._named(said.get("eos_token"), KNOWN_EOS)
        _check_bos_eos(self.bos_id, self.eos_id, name=name)
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def _named(self, said: str | dict | None, known: tuple[str, ...]) -> int:
        spelled = said["content"] if isinstance(said, dict) else said
        candidates = (spelled,) if spelled else known
        found = [self.piece_id(piece) for piece in candidates]
        return next((i for i in found if i is not None), -1)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        # A byte-level vocabulary writes each byte as one character; others write text, a space as
        # U+2581 and a lone byte as <0xNN>.
        byte_level = "ByteLevel" in json.dumps(json.loads(self._content)["decoder"])
        added = self._model.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for piece, i in self._model.get_vocab(with_added_tokens=True).items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(piece.encode())
            elif byte_level:
                sizes[i] = len(piece)
            elif len(piece) == 6 and piece.startswith("<0x"):
                sizes[i] = 1
            else:
                sizes[i] = len(piece.replace(SPACE, " ").encode())
        return sizes

    def piece_id(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def files(self) -> dict[str, bytes]:
        config = {"tokenizer_config.json": self._config} if self._config else {}
        return {"tokenizer.json": self._content} | config


def _check_bos_eos(bos_id: int, eos_id: int, *, name: str) -> None:
    """Documents are joined as BOS ... EOS and found again by their BOS, so both must exist."""
    if bos_id < 0 or eos_id < 0 or bos_id == eos_id:
        raise ValueError(
            f"{name} needs a BOS and an EOS token that differ, got ids {bos_id} and {eos_id}: name "
            "them in the tokenizer_config.json beside it"
        )


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer `spec` names: "bytes", a `*.model`, a `tokenizer.json`, or a folder of one."""
    if spec == "bytes":
        return ByteTokenizer()
    path = epath.Path(spec)
    if path.is_dir():
        names = ("tokenizer.model", "tokenizer.json", "tokenizer.bytes")
        found = [path / name for name in names if (path / name).exists()]
        found += sorted(path.glob("*.model"))
        if not found:
            raise ValueError(
                f"tokenizer folder {spec} holds none of {', '.join(names)} or *.model: give the "
                "folder of a tokenizer"
            )
        path = found[0]
    if not path.exists():
        raise ValueError(
            f'no tokenizer at {spec}: give "bytes", a SentencePiece *.model, a tokenizer.json, or '
            "a folder that holds one"
        )
    if path.suffix == ".bytes":
        return ByteTokenizer()
    if path.suffix == ".json":
        beside = path.parent / "tokenizer_config.json"
        config = beside.read_bytes() if beside.exists() else b""
        return HuggingFaceTokenizer(path.read_bytes(), config, name=str(path))
    return SentencePieceTokenizer(path.read_bytes(), name=str(path))


def train_sentencepiece(
    texts: Iterable[str],
    path: str,
    *,
    vocab_size: int,
    num_threads: int = 2,
) -> SentencePieceTokenizer:
    """Train LLaMA's kind of tokenizer on `texts` and write it to `path`.

    BPE with byte fallback and split digits; unlike LLaMA's own, it keeps text exactly: identity
    normalisation, runs of spaces kept, no dummy prefix. All of `texts` is held in memory.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,  # as LLaMA; rarer characters are spelled by bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_TRAINING_LINE * 4,  # in bytes; longer lines would be dropped
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip().rstrip(".")
        raise ValueError(
            f"cannot train a tokenizer of {vocab_size} pieces on this text: {reason}"
        ) from None
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f"{target.name}.tmp"
    partial.write_bytes(model.getvalue())
    partial.replace(target)
    return SentencePieceTokenizer(model.getvalue(), name=path)


MAX_TRAINING_LINE = 4096


def _training_lines(texts: Iterable[str]) -> Iterable[str]:
    """Lines of bounded length: SentencePiece drops the lines that exceed its limit."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), MAX_TRAINING_LINE):
                yield line[start : start + MAX_TRAINING_LINE]
