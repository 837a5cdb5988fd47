"""Tokenizer: text to ids and back, with one face over bytes, SentencePiece and `tokenizer.json`.

What it is not: a chat template or a batcher. `encode` never adds BOS or EOS, and text can never
become a special id: a document that contains the characters `<s>` gets ordinary pieces for them.
Special ids come only from `special_id`, which `example.py` calls for segments marked special, and
from `encode_with_specials`, which is for the text of templates and never for that of users.

Each id stands for some bytes (`pieces`), special ids for none. They are all that decoding knows,
so that a stream of ids (`stream.py`) and `decode` cannot differ, and they make bits per byte
comparable between tokenizers: the bytes of `encode(text)` sum to `len(text.encode())`. One
exception: LLaMA 1 and 2 put a space before every non-empty text (`prefix_space`), so there it is
one byte more, and `decode` takes it off again.
"""

import abc
import base64
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers
from etils import epath
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers

SPACE = "\u2581"  # SentencePiece writes a space as this character

SAID_OF_ENDS = ("add_bos_token", "bos_token", "eos_token")  # in a `tokenizer_config.json`
# BOS and EOS of `tokenizer.json` files that come without a `tokenizer_config.json`.
KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]")
KNOWN_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[EOS]")
# What ends a turn; LLaMA 1 and 2 have none, nor another use for the last.
KNOWN_EOT = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<unk>")


class Tokenizer(abc.ABC):
    """What the rest of the package knows of a tokenizer."""

    vocab_size: int
    bos_id: int | None  # may equal eos_id, as in GPT-2
    eos_id: int
    add_bos: bool  # the model expects BOS before a plain text
    fingerprint: str  # sha256 of the tokenizer's content: equal fingerprints give equal ids
    prefix_space: bool = False  # `encode` puts a space before the text
    prefix_after_special: bool = True  # ... and also where the text follows a special token

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone: no BOS, no EOS, no special ids."""

    @abc.abstractmethod
    def _make_pieces(self) -> list[bytes]:
        """See `pieces`."""

    @abc.abstractmethod
    def specials(self) -> dict[str, int]:
        """Spelling and id of every special token."""

    @abc.abstractmethod
    def piece_id(self, piece: str) -> int | None:
        """The id spelled `piece` in the vocabulary, or None."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """File name to content: what `save` writes and `load_tokenizer` reads."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of `text` where it goes on after another text: no space is put before it."""
        if not self.prefix_space:
            return self.encode(text)
        anchor = "\0"  # merges with nothing
        return self.encode(anchor + text)[len(self.encode(anchor)) :]

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a plain text as the model expects it: with its BOS, if it was trained so."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    def split_specials(self, text: str) -> list[str]:
        """`text` cut at the spellings of special tokens: plain, special, plain, ..., plain."""
        spellings = sorted(self.specials(), key=len, reverse=True)  # the longest match wins
        pattern = "|".join(map(re.escape, spellings))
        return re.split(f"({pattern})", text) if spellings else [text]

    def encode_with_specials(self, text: str) -> list[int]:
        """The ids of a template's own text, where the spelling of a special token means its id."""
        first, *rest = self.split_specials(text)
        specials, ids = self.specials(), self.encode(first)
        encode = self.encode if self.prefix_after_special else self.encode_continuation
        for special, plain in zip(rest[::2], rest[1::2], strict=True):
            ids += [specials[special], *encode(plain)]
        return ids

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """UTF-8 bytes of text that each id stands for; none for special ids."""
        return self._make_pieces()

    def decode(
        self, ids: Sequence[int] | Int[np.ndarray, " n"], *, continuation: bool = False
    ) -> str:
        """The text of `ids`, a whole text or one that goes on; special ids stand for no text."""
        content = b"".join(self.pieces[i] for i in ids)
        if self.prefix_space and not continuation:
            content = content.removeprefix(b" ")
        return content.decode(errors="replace")

    def token_bytes(self) -> Int[np.ndarray, "V"]:
        """How many bytes of text each id stands for."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    def special_id(self, name: str) -> int:
        """The id of "bos", "eos", "eot" or a special token spelled as in the vocabulary.

        "eot" ends a turn: the first of `KNOWN_EOT` that the vocabulary has, the last of which is
        LLaMA's id 0. Its text never yields that, as bytes spell whatever is unknown.
        """
        known = {"bos": self.bos_id, "eos": self.eos_id}
        spellings = KNOWN_EOT if name == "eot" else (name,)
        candidates = [known[s] if s in known else self.piece_id(s) for s in spellings]
        found = next((i for i in candidates if i is not None), None)
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
        self.add_bos = True
        self.fingerprint = hashlib.sha256(self.marker).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [byte + self.first_byte for byte in text.encode()]

    def _make_pieces(self) -> list[bytes]:
        return [b""] * self.first_byte + [bytes([byte]) for byte in range(256)]

    def specials(self) -> dict[str, int]:
        return {"<s>": self.bos_id, "</s>": self.eos_id}

    def piece_id(self, piece: str) -> int | None:
        return self.specials().get(piece)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.bytes": self.marker}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `*.model`; of BOS and EOS the `tokenizer_config.json` beside it decides.

    Special are its control pieces, BOS and EOS, and user-defined symbols spelled like
    `<|im_start|>`, as some converters write them; text that contains such a spelling is cut inside.
    """

    def __init__(self, content: bytes, config: bytes = b"", *, name: str):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise ValueError(
                f"{name} is neither a SentencePiece model nor Llama 3's list of ranks: give the "
                "tokenizer.json that came with the model instead"
            ) from None
        self._content = content
        self.vocab_size = self._model.vocab_size()
        said = json.loads(config) if config else {}
        self._config = {key: said[key] for key in SAID_OF_ENDS if said.get(key) is not None}
        self.bos_id = self._named("bos_token", self._model.bos_id())
        self.eos_id = _known_eos(self._named("eos_token", self._model.eos_id()), name)
        self.add_bos = self.bos_id is not None and self._config.get("add_bos_token", True)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.prefix_space = self._model.encode("a", out_type=str)[0].startswith(SPACE)
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_ids = byte_ids if all(map(self._model.is_byte, byte_ids)) else None
        plain = [
            self._model.id_to_piece(i)
            for i in range(self.vocab_size)
            if not (self._model.is_control(i) or self._model.is_byte(i))
        ]
        ends = [self._model.id_to_piece(i) for i in (self.bos_id, self.eos_id) if i is not None]
        self._markup = [p for p in plain if re.fullmatch(r"<\|.+\|>", p) or p in ends]
        # Where text is cut. A literal U+2581 would be taken for a space: its bytes spell it.
        cuts = [f"({SPACE})"] if self._space_ids else ["(?!)()"]
        cuts += [f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in self._markup]
        self._cuts = re.compile("|".join(cuts))

    def _named(self, key: str, otherwise: int) -> int | None:
        """The id of what the configuration says, else `otherwise`, the model's own; -1 is none."""
        found = self.piece_id(_spelling(self._config.get(key)) or "")
        return found if found is not None else otherwise if otherwise >= 0 else None

    def encode(self, text: str) -> list[int]:
        if not self._cuts.search(text):
            return self._model.encode(text)
        first, *rest = self._cuts.split(text)
        ids = self._model.encode(first)
        for space, part in zip(rest[::2], rest[1::2], strict=True):
            ids += self._space_ids if space else []
            ids += self.encode_continuation(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(map(self._cuts.search, texts)):
            return super().encode_batch(texts)
        return self._model.encode(list(texts))  # in C++ threads

    def _make_pieces(self) -> list[bytes]:
        silent = set(self.specials().values())

        def content(i: int) -> bytes:
            piece = self._model.id_to_piece(i)
            if self._model.is_byte(i):
                return bytes([int(piece[1:-1], 16)])
            if i in silent or self._model.is_unknown(i) or self._model.is_unused(i):
                return b""
            return piece.replace(SPACE, " ").encode()

        return [content(i) for i in range(self.vocab_size)]

    def specials(self) -> dict[str, int]:
        model = self._model
        control = [model.id_to_piece(i) for i in range(self.vocab_size) if model.is_control(i)]
        return {piece: model.piece_to_id(piece) for piece in control + self._markup}

    def piece_id(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)
        return found if self._model.id_to_piece(found) == piece else None

    def files(self) -> dict[str, bytes]:
        config = {"tokenizer_config.json": json.dumps(self._config).encode()}
        return {"tokenizer.model": self._content} | (config if self._config else {})


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; of BOS and EOS the `tokenizer_config.json` beside it speaks, if any.

    Understood are byte-level vocabularies (GPT-2, Llama 3) and SentencePiece's (LLaMA 1 and 2).
    """

    def __init__(self, content: bytes, config: bytes, *, name: str):
        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the Rust library raises bare Exception
            raise ValueError(f"{name} is not a tokenizer.json: {error}") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._content, self._config = content, config
        self._vocab = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        said = json.loads(config) if config else {}
        self.bos_id = self._named(said.get("bos_token"), KNOWN_BOS)
        self.eos_id = _known_eos(self._named(said.get("eos_token"), KNOWN_EOS), name)
        added = said.get("add_bos_token")
        if added is None:
            added = self._model.encode("a").ids[0] == self.bos_id
        self.add_bos = added and self.bos_id is not None
        self.fingerprint = hashlib.sha256(content).hexdigest()
        alone = self._model.encode("a", add_special_tokens=False)
        self.prefix_space = alone.tokens[0].startswith((SPACE, BYTE_LEVEL[ord(" ")]))
        (eos,) = [spelled for spelled, i in self._vocab.items() if i == self.eos_id]
        after_special = self._model.encode(f"{eos}a", add_special_tokens=False).ids[1:]
        self.prefix_after_special = after_special == alone.ids
        self._model.encode_special_tokens = True  # special tokens in a text are plain characters

    def _named(self, said: str | dict | None, known: tuple[str, ...]) -> int | None:
        spelled = _spelling(said)
        candidates = (spelled,) if spelled else known
        found = [self.piece_id(piece) for piece in candidates]
        return next((i for i in found if i is not None), None)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def _make_pieces(self) -> list[bytes]:
        byte_level = "ByteLevel" in json.dumps(json.loads(self._content)["decoder"])
        byte_of = {character: byte for byte, character in enumerate(BYTE_LEVEL)}
        added = self._model.get_added_tokens_decoder()
        pieces = [b""] * self.vocab_size
        for piece, i in self._vocab.items():
            if i in added:
                pieces[i] = b"" if added[i].special else piece.encode()
            elif byte_level:
                pieces[i] = bytes(byte_of[character] for character in piece)
            elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
                pieces[i] = bytes([int(piece[1:-1], 16)])
            else:
                pieces[i] = piece.replace(SPACE, " ").encode()
        return pieces

    def specials(self) -> dict[str, int]:
        added = self._model.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def piece_id(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def files(self) -> dict[str, bytes]:
        config = {"tokenizer_config.json": self._config} if self._config else {}
        return {"tokenizer.json": self._content} | config


def _spelling(said: str | dict | None) -> str | None:
    """A token as `tokenizer_config.json` names it, with or without its options."""
    return said["content"] if isinstance(said, dict) else said


def _byte_level_alphabet() -> list[str]:
    """GPT-2's spelling of each byte as one visible character."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + others.index(byte)) for byte in range(256)]


BYTE_LEVEL = _byte_level_alphabet()


def _known_eos(eos_id: int | None, name: str) -> int:
    if eos_id is None:
        raise ValueError(
            f"{name} names no EOS token, so nothing could tell the end of a text: name it in the "
            "tokenizer_config.json beside it"
        )
    return eos_id


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128_000
LLAMA3_SPECIALS = {  # by number; the others of the 256 are reserved. As of Llama 3.1.
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def llama3_tokenizer(content: bytes, *, name: str) -> HuggingFaceTokenizer:
    """Llama 3's `tokenizer.model`, in tiktoken's format: a token in base64 and its rank a line."""
    lines = [line.split() for line in content.splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if len(ranks) != LLAMA3_RANKS:
        raise ValueError(
            f"{name} holds {len(ranks)} ranks where Llama 3 has {LLAMA3_RANKS}: give the "
            "tokenizer.json that came with the model instead"
        )

    def spelled(token: bytes) -> str:
        return "".join(BYTE_LEVEL[byte] for byte in token)

    # Every way to make a token of two: the token's rank orders them, then the ranks of the parts.
    merges = []
    for token, rank in ranks.items():
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        both = [(rank, ranks[l], ranks[r], l, r) for l, r in halves if l in ranks and r in ranks]
        merges += both
    merges = [(spelled(left), spelled(right)) for *_, left, right in sorted(merges)]
    vocab = {spelled(token): rank for token, rank in ranks.items()}
    model = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    model.decoder = decoders.ByteLevel()
    reserved = iter(range(256))
    specials = [
        LLAMA3_SPECIALS.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)
    ]
    model.add_special_tokens(specials)
    config = {"bos_token": specials[0], "eos_token": specials[1], "add_bos_token": True}
    as_json = model.to_str().encode()
    return HuggingFaceTokenizer(as_json, json.dumps(config).encode(), name=name)


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
        if len(found) > 1 and found[1].name == "tokenizer.json":
            return _of_two(load_tokenizer(str(found[0])), load_tokenizer(str(found[1])))
        path = found[0]
    if not path.exists():
        raise ValueError(
            f'no tokenizer at {spec}: give "bytes", a SentencePiece *.model, a tokenizer.json, or '
            "a folder that holds one"
        )
    if path.suffix == ".bytes":
        return ByteTokenizer()
    beside = path.parent / "tokenizer_config.json"
    config = beside.read_bytes() if beside.exists() else b""
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path.read_bytes(), config, name=str(path))
    content = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", content):
        return llama3_tokenizer(content, name=str(path))
    return SentencePieceTokenizer(content, config, name=str(path))


def _of_two(original: Tokenizer, converted: Tokenizer) -> Tokenizer:
    """`tokenizer.model` is the original, unless fine-tuning added tokens, which are in the other.

    Converted files can differ: transformers 5.23 turns LLaMA's into one with other ids for runs of
    spaces and for spaces after a line break.
    """
    is_whole = isinstance(original, SentencePieceTokenizer)
    return original if is_whole and original.vocab_size >= converted.vocab_size else converted


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
