"""Token store: one source's text and token stream on disk, as two TFDS datasets in ArrayRecord.

    <folder>/documents/1.0.0   text and metadata (JSON) of every document, in stream order
    <folder>/tokens/1.0.0      the stream BOS doc EOS BOS doc EOS ... in blocks of fixed size
    <folder>/store.json        counts, tokenizer and block size (`StoreInfo`); written last

Both open with `tfds.builder("tokens", data_dir=folder)`; TensorFlow is not needed for any of it.
What it is not: a reader of rows or a mixture (`mixture.py` cuts rows out of the stream). Written by
`prepare.py`.

Documents are shuffled once, here, so that a row of the stream holds unrelated neighbours: each goes
into one of 256 temporary files by a hash, and each of these is then sorted alone. Memory is thus
1/256 of the source and the temporary files ($TMPDIR) take as much room as its text. The split is
by a hash of the text alone, so two equal documents never stand on both sides.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Int
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from easylm_jax.data.documents import Document
from easylm_jax.data.rows import check_joins_documents
from easylm_jax.text.tokenizer import Tokenizer

BLOCK_TOKENS = 8192
SHARD_BYTES = 256 << 20
NUM_BUCKETS = 256
ENCODE_CHARS = 1 << 20  # of text tokenised at once, by the tokenizer's own threads
VERSION = "1.0.0"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class StoreInfo:
    """What `store.json` says. `documents`, `text_bytes` and `tokens` are counts per split."""

    tokenizer: str  # fingerprint
    vocab_size: int
    bos_id: int
    eos_id: int
    block_tokens: int
    documents: dict[str, int]
    text_bytes: dict[str, int]
    tokens: dict[str, int]
    origin: str  # hash of what the store was made from
    left_out: dict[str, int]  # documents not used, by reason


def write_store(
    documents: Iterable[Document],
    folder: str,
    *,
    tokenizer: Tokenizer,
    validation_fraction: float,
    origin: str = "",
    left_out: Mapping[str, int] = MappingProxyType({}),
    block_tokens: int = BLOCK_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> StoreInfo:
    """Write the store of one source; `progress` gets the bytes of text tokenised and in all.

    All is written under a temporary name and renamed at the end. `left_out` is only recorded, after
    all documents have been read, so it may be what their reader counts.
    """
    check_joins_documents(tokenizer)
    final = epath.Path(folder)
    partial = final.parent / f"{final.name}.tmp"
    if partial.exists():
        partial.rmtree()
    with tempfile.TemporaryDirectory(prefix="easylm_shuffle_") as buckets:
        total_bytes = _fill_buckets(documents, Path(buckets), validation_fraction)
        writer = _StoreWriter(partial, tokenizer, block_tokens)
        done_bytes = 0
        for batch in _batches(_read_buckets(Path(buckets))):
            done_bytes += writer.add(batch)
            progress(done_bytes, total_bytes)
    info = writer.finish(origin, dict(left_out))
    content = json.dumps(dataclasses.asdict(info), indent=2)
    (partial / "store.json").write_text(content)
    partial.rename(final)
    return info


def read_info(folder: str) -> StoreInfo:
    path = epath.Path(folder) / "store.json"
    if not path.exists():
        raise ValueError(
            f"no finished token store in {folder}: make it with `python -m easylm_jax.prepare`"
        )
    return StoreInfo(**json.loads(path.read_text()))


class TokenStream:
    """Random access to the token stream of one split."""

    def __init__(self, folder: str, split: str):
        self.info = read_info(folder)
        self.num_tokens = self.info.tokens[split]
        self._blocks = None
        if self.num_tokens:
            builder = tfds.builder_from_directory(epath.Path(folder) / "tokens" / VERSION)
            self._blocks = builder.as_data_source(split=split)
        self._cached: tuple[int, np.ndarray | None] = (-1, None)  # rows mostly share a block

    def read(self, start: int, num_tokens: int) -> Int[np.ndarray, " n"]:
        """Tokens `start` to `start + num_tokens` of the stream, as int32."""
        size = self.info.block_tokens
        first, last = start // size, (start + num_tokens - 1) // size
        tokens = np.concatenate([self._block(i) for i in range(first, last + 1)])
        begin = start - first * size
        return tokens[begin : begin + num_tokens].astype(np.int32)

    def _block(self, index: int) -> np.ndarray:
        if self._cached[0] != index:
            self._cached = (index, self._blocks[index]["tokens"])
        return self._cached[1]


def open_tokens(folder: str, split: str) -> TokenStream:
    """The token stream of "train" or "validation" of the store in `folder`."""
    return TokenStream(folder, split)


def _fill_buckets(documents: Iterable[Document], folder: Path, fraction: float) -> int:
    """Spread the documents over files by a hash; returns the bytes of text."""
    total_bytes = 0
    files = [(folder / f"{i:03d}").open("w", encoding="utf-8") for i in range(NUM_BUCKETS)]
    for number, document in enumerate(documents):
        content = document.text.encode()
        total_bytes += len(content)
        digest = hashlib.blake2b(content, digest_size=8).digest()
        split = "validation" if int.from_bytes(digest, "big") < fraction * 2**64 else "train"
        # With its number hashed in, equal documents do not end up side by side.
        order = hashlib.blake2b(digest + number.to_bytes(8, "big"), digest_size=8).digest()
        line = json.dumps([order.hex(), split, document.text, document.meta])
        files[order[0]].write(line + "\n")
    for file in files:
        file.close()
    return total_bytes


def _read_buckets(folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(split, text, meta) of every document in the order of the hash."""
    for path in sorted(folder.iterdir()):
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        for _, split, text, meta in sorted(rows, key=lambda row: row[0]):
            yield split, text, meta
        path.unlink()


def _batches(documents: Iterable[tuple]) -> Iterator[list[tuple]]:
    """Documents in lists of bounded size: ids in Python lists take many times its room."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= ENCODE_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _StoreWriter:
    """Documents in, two TFDS datasets out."""

    def __init__(self, folder: epath.Path, tokenizer: Tokenizer, block_tokens: int):
        text = tfds.features.Text()
        # Stored as raw bytes: smaller and faster than the default list of int64.
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        tokens = tfds.features.Tensor(shape=(None,), dtype=dtype, encoding="bytes")
        self._dtype, self._tokenizer, self._block_tokens = dtype, tokenizer, block_tokens
        self._documents = _DatasetWriter(folder, "documents", {"text": text, "meta": text})
        self._tokens = _DatasetWriter(folder, "tokens", {"tokens": tokens})
        self._pending = {split: np.zeros(0, dtype) for split in SPLITS}  # less than a block
        self._counts = {
            name: dict.fromkeys(SPLITS, 0) for name in ("documents", "text_bytes", "tokens")
        }

    def add(self, batch: list[tuple[str, str, dict[str, Any]]]) -> int:
        """Write the documents (split, text, meta); returns the bytes of their text."""
        encoded = self._tokenizer.encode_batch([text for _, text, _ in batch])
        stream: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        added_bytes = 0
        for (split, text, meta), ids in zip(batch, encoded, strict=True):
            self._documents.write(split, {"text": text, "meta": json.dumps(meta)})
            ids = [self._tokenizer.bos_id, *ids, self._tokenizer.eos_id]
            stream[split].append(np.array(ids, self._dtype))
            num_bytes = len(text.encode())
            added_bytes += num_bytes
            for name, count in (("documents", 1), ("text_bytes", num_bytes), ("tokens", len(ids))):
                self._counts[name][split] += count
        for split in SPLITS:
            self._write_blocks(split, np.concatenate([self._pending[split], *stream[split]]))
        return added_bytes

    def _write_blocks(self, split: str, tokens: np.ndarray) -> None:
        whole = len(tokens) // self._block_tokens * self._block_tokens
        for block in tokens[:whole].reshape(-1, self._block_tokens):
            self._tokens.write(split, {"tokens": block})
        self._pending[split] = tokens[whole:]

    def finish(self, origin: str, left_out: dict[str, int]) -> StoreInfo:
        for split in SPLITS:
            if len(self._pending[split]):
                self._tokens.write(split, {"tokens": self._pending[split]})
        self._documents.finish()
        self._tokens.finish()
        return StoreInfo(
            tokenizer=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            bos_id=self._tokenizer.bos_id,
            eos_id=self._tokenizer.eos_id,
            block_tokens=self._block_tokens,
            origin=origin,
            left_out=left_out,
            **self._counts,
        )


class _DatasetWriter:
    """One TFDS dataset, its examples kept in the order written."""

    def __init__(self, folder: epath.Path, name: str, features: dict[str, Any]):
        self._folder = folder / name / VERSION
        self._folder.mkdir(parents=True, exist_ok=True)
        self._name = name
        self._features = tfds.features.FeaturesDict(features)
        self._serializer = ExampleSerializer(self._features.get_serialized_info())
        self._shards = {split: _ShardWriter(self._folder / split) for split in SPLITS}

    def write(self, split: str, example: dict[str, Any]) -> None:
        encoded = self._features.encode_example(example)
        self._shards[split].write(self._serializer.serialize_example(encoded))

    def finish(self) -> None:
        splits = []
        for split, shards in self._shards.items():
            template = tfds.core.ShardedFileTemplate(
                data_dir=self._folder,
                dataset_name=self._name,
                split=split,
                filetype_suffix="array_record",
            )
            lengths = shards.finish(template)
            if lengths:
                split_info = tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=lengths,
                    num_bytes=shards.num_bytes,
                    filename_template=template,
                )
                splits.append(split_info)
        identity = DatasetIdentity(
            name=self._name,
            version=tfds.core.Version(VERSION),
            data_dir=str(self._folder),
            module_name=__name__,
        )
        info = tfds.core.DatasetInfo(
            builder=identity, features=self._features, disable_shuffling=True
        )
        info.set_file_format("array_record")
        info.set_splits(tfds.core.splits.SplitDict(splits))
        info.write_to_directory(self._folder)


class _ShardWriter:
    """ArrayRecord files of bounded size; named only at the end, when their number is known."""

    def __init__(self, prefix: epath.Path):
        self._prefix, self._file, self._lengths = prefix, None, []
        self._shard_bytes = self.num_bytes = 0

    def write(self, record: bytes) -> None:
        if self._file is None or self._shard_bytes + len(record) > SHARD_BYTES:
            self._close()
            # Groups of one record: Grain and TFDS read single records at random.
            self._file = ArrayRecordWriter(self._partial(len(self._lengths)), "group_size:1")
            self._lengths.append(0)
            self._shard_bytes = 0
        self._file.write(record)
        self._lengths[-1] += 1
        self._shard_bytes += len(record)
        self.num_bytes += len(record)

    def finish(self, template: tfds.core.ShardedFileTemplate) -> list[int]:
        """Give the files their TFDS names; returns the number of records in each."""
        self._close()
        for i in range(len(self._lengths)):
            name = template.sharded_filepath(shard_index=i, num_shards=len(self._lengths))
            epath.Path(self._partial(i)).rename(name)
        return self._lengths

    def _partial(self, index: int) -> str:
        return f"{self._prefix}-{index:05d}.partial"

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
