"""Source: what the trainer takes batches from, and how the data config becomes one.

What it is not: the making of rows (`mixture.py`, `packing.py`). Called by `train.py`, which places
the batches on the mesh and saves `state()` with each checkpoint.
"""

import dataclasses
import difflib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from etils import epath

from easylm_jax.batch import Batch
from easylm_jax.data.conversation import Pair, find_pairs
from easylm_jax.data.documents import BadLine, BadLines, read_documents
from easylm_jax.data.finetuning import ChatConfig, Encoded, encode_files, render_conversation
from easylm_jax.data.mixture import MixtureSource
from easylm_jax.data.packing import (
    PackedSource,
    Piece,
    Strategy,
    TooLong,
    lay_out,
    pack_all,
)
from easylm_jax.data.readers import read_conversations
from easylm_jax.data.rows import check_joins_documents, rows_to_batch
from easylm_jax.data.token_store import TokenStream, open_tokens
from easylm_jax.text.example import document_example, encode_example
from easylm_jax.text.fields import FieldsConfig
from easylm_jax.text.template import ChatTemplate
from easylm_jax.text.tokenizer import Tokenizer


@runtime_checkable
class Source(Protocol):
    """An endless supply of batches that can be saved and restored exactly."""

    def next(self) -> tuple[Batch, dict[str, float]]:
        """This process's rows of the next batch (NumPy), and metrics of the data so far."""

    @property
    def tokens_per_epoch(self) -> int | None:
        """Tokens of one pass over everything, in proportion; None where nobody has counted."""

    def describe(self) -> str:
        """What there is to train on, in one line."""

    def state(self) -> dict[str, Any]:
        """JSON-able; the same on every process; independent of their number."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where training text comes from: a prepared `root`, or `files` packed on the fly.

    Files hold documents; with `chat` conversations; with `fields` records in EasyLM's language.
    """

    root: str = ""  # folder made by `python -m easylm_jax.prepare`
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    # ^ share of the rows per source, of any sum; empty: in proportion to the sources' tokens
    max_epochs: float = 4.0  # warn when a source is read more often than this

    files: tuple[str, ...] = ()  # globs of JSONL or text; all of it is held in memory
    heldout_files: tuple[str, ...] = ()
    text_field: str = "text"  # of a document
    chat: ChatConfig | None = None
    fields: FieldsConfig | None = None
    on_bad_line: BadLines = "error"
    packing: Strategy = "best_fit"
    too_long: TooLong = "cut"  # of documents and `fields`; conversations have chat.too_long
    window: int = 64  # rows that best_fit keeps open

    seed: int = 0


def make_source(
    cfg: DataConfig,
    *,
    batch_size: int,
    seq_len: int,
    tokenizer: Tokenizer,
    rows: Sequence[int],
    template: ChatTemplate | None = None,
) -> Source:
    """The training source of `cfg`: of each batch of `batch_size` rows, those numbered `rows`.

    A process asks for the rows that its devices hold; the batch does not depend on who asks.
    `template` renders the conversations of `cfg.chat`.
    """
    shape = {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "seed": cfg.seed,
        "rows": rows,
    }
    if _is_prepared(cfg):
        streams = _open_streams(cfg, "train", tokenizer)
        weights = cfg.weights or {name: float(s.num_tokens) for name, s in streams.items()}
        return MixtureSource(streams, weights, max_epochs=cfg.max_epochs, **shape)
    examples = open_examples(cfg, cfg.files, tokenizer, seq_len=seq_len, template=template)
    return PackedSource(
        examples,
        strategy=cfg.packing,
        too_long=cfg.too_long,
        window=cfg.window,
        left_out=examples.counts,
        identity=examples.identity if isinstance(examples, Encoded) else None,
        **shape,
    )


def open_examples(
    cfg: DataConfig,
    files: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    template: ChatTemplate | None = None,
) -> "Encoded | _FileExamples":
    """The examples of `files` as (ids, weights): documents, conversations or records."""
    if cfg.chat and cfg.fields:
        raise ValueError("data.chat and data.fields both say how to read the files: set one")
    if not (cfg.chat or cfg.fields):
        return _FileExamples(files, cfg, tokenizer)
    return encode_files(
        files,
        chat=cfg.chat,
        fields=cfg.fields,
        template=template,
        tokenizer=tokenizer,
        seq_len=seq_len,
        on_bad_line=cfg.on_bad_line,
    )


def heldout_batches(
    cfg: DataConfig,
    *,
    batch_size: int,
    seq_len: int,
    tokenizer: Tokenizer,
    rows: Sequence[int],
    template: ChatTemplate | None = None,
    source: str | None = None,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """The held-out data, the same batches at every call, each token once as a target.

    All sources of a prepared `root` one after another, or only `source`; else `heldout_files`. The
    last batch is padded with segment 0. `max_batches` takes that many, spread evenly over the rows.
    """
    everything: Sequence[Any]
    if _is_prepared(cfg):
        streams = _open_streams(cfg, "validation", tokenizer)
        names = streams if source is None else [_known_name(source, streams)]
        spans = [
            (streams[name], start)
            for name in names
            for start in range(0, streams[name].num_tokens - 1, seq_len)
        ]
        everything = _evenly(spans, batch_size, max_batches)
    else:
        examples: Sequence[Any] = ()
        if files := cfg.heldout_files:
            examples = open_examples(cfg, files, tokenizer, seq_len=seq_len, template=template)
        packed = pack_all(map(Piece._make, examples), strategy=cfg.packing, seq_len=seq_len)
        everything = _evenly(packed, batch_size, max_batches)

    def make(batch_rows: Sequence[Any]) -> Batch:
        taken = [batch_rows[i] if i < len(batch_rows) else None for i in rows]
        if _is_prepared(cfg):
            return _cut_spans(taken, seq_len, tokenizer.bos_id)
        return lay_out([row or [] for row in taken], seq_len)

    starts = range(0, len(everything), batch_size)
    return (make(everything[i : i + batch_size]) for i in starts)


def heldout_pairs(cfg: DataConfig, template: ChatTemplate) -> list[Pair]:
    """The compared answers among the held-out conversations that the template can write."""
    if not (cfg.chat and cfg.heldout_files):
        raise ValueError("eval.pairs needs data.chat and data.heldout_files with compared answers")
    conversations = read_conversations(
        cfg.heldout_files,
        reader=cfg.chat.reader,
        source="",
        counts=Counter(),
        on_bad_line=cfg.on_bad_line,
    )
    pairs = [p for p in find_pairs(conversations) if _can_write(p, cfg, template)]
    if not pairs:
        raise ValueError(
            f"eval.pairs: no two answers in {', '.join(cfg.heldout_files)} were compared with one "
            "another; give preference data or set it to 0"
        )
    return pairs


def _can_write(pair: Pair, cfg: DataConfig, template: ChatTemplate) -> bool:
    try:
        return all(render_conversation(answer, cfg.chat, template) for answer in pair)
    except BadLine:
        if cfg.on_bad_line == "error":
            raise
        return False


def source_names(root: str) -> list[str]:
    """The sources that `prepare` finished in `root`."""
    folder = epath.Path(root)
    if not folder.is_dir():
        raise ValueError(
            f"no prepared data set in {root}: make it with `python -m easylm_jax.prepare`"
        )
    return sorted(path.name for path in folder.iterdir() if (path / "store.json").exists())


def _is_prepared(cfg: DataConfig) -> bool:
    if bool(cfg.root) == bool(cfg.files):
        raise ValueError(
            "data needs either root (a prepared data set) or files (globs of raw text), got "
            f"root={cfg.root!r} and files={cfg.files!r}: set one of them"
        )
    return bool(cfg.root)


def _open_streams(
    cfg: DataConfig, split: Literal["train", "validation"], tokenizer: Tokenizer
) -> dict[str, TokenStream]:
    """The streams of the sources that have a weight."""
    known = source_names(cfg.root)
    if not known:
        raise ValueError(f"{cfg.root} holds no prepared source: prepare it again")
    if cfg.weights and (min(cfg.weights.values()) < 0 or max(cfg.weights.values()) <= 0):
        raise ValueError(
            f"data.weights must be >= 0 and one of them > 0, got {dict(cfg.weights)}: mend them"
        )
    check_joins_documents(tokenizer)
    names = [_known_name(name, known) for name in cfg.weights or known]
    streams = {name: open_tokens(f"{cfg.root}/{name}", split) for name in names}
    for name, stream in streams.items():
        if stream.info.tokenizer != tokenizer.fingerprint:
            raise ValueError(
                f"source {name!r} in {cfg.root} was tokenised by another tokenizer (fingerprint "
                f"{stream.info.tokenizer[:12]}) than the model's ({tokenizer.fingerprint[:12]}): "
                f"use {cfg.root}/tokenizer or prepare the data again"
            )
    return streams


def _known_name(name: str, known: Collection[str]) -> str:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
        raise ValueError(f"there is no source {name!r}; near it: {', '.join(near)}")
    return name


def _evenly(rows: Sequence[Any], batch_size: int, max_batches: int | None) -> Sequence[Any]:
    if max_batches is None or len(rows) <= max_batches * batch_size:
        return rows
    count = max_batches * batch_size
    return [rows[i * len(rows) // count] for i in range(count)]


def _cut_spans(spans: Sequence[tuple[TokenStream, int] | None], seq_len: int, bos_id: int) -> Batch:
    """Rows that start at the given places of streams; None is a row of padding."""
    rows = np.zeros((len(spans), seq_len + 1), np.int32)
    lengths = np.zeros(len(spans), np.int32)
    for b, span in enumerate(spans):
        if span is not None:
            stream, start = span
            lengths[b] = min(seq_len + 1, stream.num_tokens - start)
            rows[b, : lengths[b]] = stream.read(start, int(lengths[b]))
    batch = rows_to_batch(rows, bos_id=bos_id)
    real = np.arange(seq_len) < lengths[:, None] - 1
    return batch.replace(
        weights=batch.weights * real,
        segment_ids=batch.segment_ids * real,
        positions=batch.positions * real,
    )


class _FileExamples(Sequence):
    """The documents of text files, tokenised when asked for."""

    def __init__(self, files: Sequence[str], cfg: DataConfig, tokenizer: Tokenizer):
        check_joins_documents(tokenizer)
        self.counts: Counter[str] = Counter()
        documents = read_documents(
            files, counts=self.counts, text_field=cfg.text_field, on_bad_line=cfg.on_bad_line
        )
        self._texts = [document.text for document in documents]
        self._tokenizer = tokenizer
        if not self._texts:
            raise ValueError(
                f"no document in {', '.join(files)} ({dict(self.counts)}): give files with text"
            )

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index >= len(self._texts):
            raise IndexError(index)
        return encode_example(document_example(self._texts[index]), self._tokenizer)
