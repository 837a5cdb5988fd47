"""Read the documents of a task: where they lie, in which of the layouts they were published in.

What it is not: prompts and items, which `task.py` makes of them, or a download: what is not there
is an error that says where it is published.

JSON, JSONL and Parquet are records. So are CSV and TSV, whose columns are called as `columns` says
or as their first line does ("Best Answer" becomes `best_answer`). Any other file is a text: one
document, or several where `split` cuts it. All may be .gz or .zst. A document also has the name of
its file without the endings, as `file`.
"""

import contextlib
import csv
import dataclasses
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from easylm_jax.data.documents import decode, match_files, read_chunks
from easylm_jax.data.readers import SUFFIXES, read_records

Doc = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """One layout of a task's data. Files are globs, relative to the folder of the data.

    `labels` are files of one label per line, which become the field `label`. With `tfds`, the
    name of a data set of TFDS, `test` and `shots` are splits. `fields` are values over the record,
    added to it one after another; `keep` and `keep_shots` say of which documents use is made.
    """

    test: str
    shots: str = ""
    labels: str = ""
    shot_labels: str = ""
    tfds: str = ""
    columns: tuple[str, ...] = ()
    split: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keep: str = ""
    keep_shots: str = ""


def missing(source: Source, data_dir: str, *, with_shots: bool) -> str:
    """The first of the source's files that is not there, "" if all are."""
    if source.tfds:
        return "" if _prepared(source.tfds, data_dir) else f"the TFDS data set {source.tfds}"
    wanted = [source.test, source.labels]
    wanted += [source.shots, source.shot_labels] if with_shots else []
    lacking = (glob for glob in wanted if glob and not _match(data_dir, glob))
    return next((str(epath.Path(data_dir) / glob) for glob in lacking), "")


def _match(data_dir: str, glob: str) -> list[epath.Path]:
    """The files that the glob matches, as they are or compressed; none if there are none."""
    for ending in ("", ".gz", ".zst"):
        with contextlib.suppress(ValueError):
            return match_files([f"{epath.Path(data_dir) / glob}{ending}"])
    return []


def read_source(source: Source, data_dir: str, *, shots: bool) -> Iterator[tuple[str, Doc]]:
    """The documents of its test data or of its shots, each with its place, as "valid.jsonl:17"."""
    where = source.shots if shots else source.test
    if source.tfds:
        yield from _read_tfds(source.tfds, data_dir, where)
        return
    files = _match(data_dir, where)
    docs = itertools.chain.from_iterable(_read_file(file, source) for file in files)
    labels = source.shot_labels if shots else source.labels
    if not labels:
        yield from docs
        return
    [labels_file] = _match(data_dir, labels)
    answers = decode(b"".join(read_chunks(labels_file)), where=labels).split()
    docs = list(docs)
    if len(docs) != len(answers):
        raise ValueError(
            f"{labels} has {len(answers)} labels for {len(docs)} documents of {where}: fetch both "
            "files again"
        )
    for (place, doc), label in zip(docs, answers, strict=True):
        yield place, doc | {"label": label}


def _read_file(file: epath.Path, source: Source) -> Iterator[tuple[str, Doc]]:
    stem, *endings = file.name.split(".")
    kind = next((f".{e}" for e in reversed(endings) if e not in ("gz", "zst")), "")
    if kind in SUFFIXES:
        for place, record in read_records([str(file)], counts=Counter()):
            yield place, {"file": stem} | record
        return
    text = decode(b"".join(read_chunks(file)), where=str(file))
    if kind in (".csv", ".tsv"):
        docs = _rows(text, source.columns, tabs=kind == ".tsv", file=file)
    else:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        parts = re.split(source.split, text) if source.split else [text]
        docs = ({"text": part} for part in parts if part.strip())
    for number, doc in enumerate(docs, start=1):
        yield f"{file.name}:{number}", {"file": stem} | doc


def _rows(text: str, columns: tuple[str, ...], *, tabs: bool, file: epath.Path) -> Iterator[Doc]:
    """Rows of a table; tabs separate columns without quoting."""
    stream = io.StringIO(text, newline="")
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    rows = csv.reader(stream, **quoting)
    names = columns or [name.strip().lower().replace(" ", "_") for name in next(rows, ())]
    for number, row in enumerate(filter(None, rows), start=1):
        if len(row) != len(names):
            raise ValueError(
                f"{file}, row {number}, has {len(row)} columns, expected {len(names)} "
                f"({', '.join(names)}): fetch the file again"
            )
        yield dict(zip(names, row, strict=True))


def prepare_command(name: str, data_dir: str) -> str:
    """What makes the data set that `missing` did not find."""
    return f"tfds build {name} --file_format=array_record --data_dir={data_dir}"


def _prepared(name: str, data_dir: str) -> str:
    """The folder of a prepared TFDS data set, in `data_dir` or where TFDS puts them; else ""."""
    import tensorflow_datasets as tfds

    for folder in (data_dir, tfds.core.constants.DATA_DIR):
        try:
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
        except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError):
            continue
        return str(builder.data_dir)
    return ""


def _read_tfds(name: str, data_dir: str, split: str) -> Iterator[tuple[str, Doc]]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(_prepared(name, data_dir))
    for number, record in enumerate(builder.as_data_source(split=split), start=1):
        yield f"{name}/{split}:{number}", _plain(record)


def _plain(value: Any) -> Any:
    """NumPy's types as Python's, bytes as text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.decode() if isinstance(value, bytes) else value
