"""Documents from JSONL and plain-text files, also .gz and .zst, local or in a bucket.

What it is not: a data set of tokens (`token_store.py`) or a filter of quality. It yields every
document once, in the order of the sorted file names. Called by `prepare.py` and `source.py`;
`readers.py` reads its lines by the same means.

JSONL (`.jsonl`, `.ndjson`, `.json`): one object per line, whose `text_field` is taken as it stands.
Any other file is plain text and one document; its line ends become newlines.
"""

import dataclasses
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal

import zstandard
from etils import epath

BadLines = Literal["error", "skip"]
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Document:
    text: str
    meta: Mapping[str, Any]  # the other fields of the JSON object, or the name of the text file


class BadLine(ValueError):
    """A document that cannot be used; `reason` is short and is what `counts` counts."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read_documents(
    paths: Sequence[str],
    *,
    counts: Counter[str],
    text_field: str = "text",
    on_bad_line: BadLines = "error",
) -> Iterator[Document]:
    """Documents of the files that the globs `paths` match.

    `counts` gains what was left out: "empty" documents, and with `on_bad_line="skip"` the bad ones
    by reason; with "error" the first bad one is raised.
    """
    for file in match_files(paths):
        try:
            for document in _read_file(file, text_field, on_bad_line, counts):
                if document.text.strip():
                    yield document
                else:
                    counts["empty"] += 1
        except BadLine as bad:  # the rest of the file cannot be read
            skip_or_raise(bad, on_bad_line, counts)


def match_files(paths: Sequence[str]) -> list[epath.Path]:
    """The files that the globs match, sorted, each once; a glob without a match is an error."""
    found: dict[str, epath.Path] = {}
    for glob in paths:
        if "**" in glob:
            raise ValueError(f"{glob} holds **, which buckets cannot list: write one * per folder")
        path = epath.Path(glob)
        wild = next((i for i, part in enumerate(path.parts) if re.search(r"[*?\[]", part)), None)
        if wild is None:
            matches = [path]
        else:
            matches = epath.Path(*path.parts[:wild]).glob("/".join(path.parts[wild:]))
        files = [match for match in matches if match.exists() and not match.is_dir()]
        if not files:
            raise ValueError(f"no file matches {glob}: give the path or the glob of text files")
        found |= {str(file): file for file in files}
    return [found[name] for name in sorted(found)]


def skip_or_raise(bad: BadLine, on_bad_line: BadLines, counts: Counter[str]) -> None:
    """What the policy says of a bad line."""
    if on_bad_line == "error":
        raise bad
    counts[bad.reason] += 1


def _read_file(
    file: epath.Path, text_field: str, on_bad_line: BadLines, counts: Counter[str]
) -> Iterator[Document]:
    kind = next((s for s in reversed(file.suffixes) if s not in (".gz", ".zst")), "")
    if kind not in JSONL_SUFFIXES:
        text = decode(b"".join(read_chunks(file)), where=str(file))
        yield Document(text.replace("\r\n", "\n").replace("\r", "\n"), {"file": file.name})
        return
    for number, line in enumerate(split_lines(read_chunks(file)), start=1):
        if not line.strip():
            continue
        try:
            yield _parse(line, text_field, where=f"{file}, line {number}")
        except BadLine as bad:
            skip_or_raise(bad, on_bad_line, counts)


def _parse(line: bytes, text_field: str, *, where: str) -> Document:
    fields = parse_object(line, where=where)
    if text_field not in fields:
        raise BadLine(
            f"no field {text_field!r}",
            f"{where} has no field {text_field!r}, only {', '.join(map(repr, fields))}: set "
            "text_field to the one that holds the text",
        )
    text = fields.pop(text_field)
    if not isinstance(text, str):
        raise BadLine(
            "text is not a string",
            f"{where}: field {text_field!r} is a {type(text).__name__}, not a string",
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise BadLine("not Unicode", f"{where}: the text holds half a surrogate pair") from None
    return Document(text, fields)


def parse_object(line: bytes, *, where: str) -> dict[str, Any]:
    """The JSON object that a line holds."""
    text = decode(line, where=where)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):  # also integers of more digits than Python takes
        raise BadLine("not JSON", f"{where} is not JSON: it starts {text[:40]!r}") from None
    if not isinstance(fields, dict):
        raise BadLine("not an object", f"{where} is a JSON {type(fields).__name__}, not an object")
    return fields


def decode(content: bytes, *, where: str) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadLine("not UTF-8", f"{where} is not UTF-8 text: {error.reason}") from None


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Split at newlines only: a line of JSONL may hold any other line separator in its text."""
    rest: list[bytes] = []
    for chunk in chunks:
        *whole, tail = chunk.split(b"\n")
        if whole:
            yield b"".join([*rest, whole[0]])
            yield from whole[1:]
            rest = []
        rest.append(tail)
    yield b"".join(rest)


def read_chunks(file: epath.Path) -> Iterator[bytes]:
    """The decompressed bytes of the file; a damaged or truncated one raises BadLine."""
    try:
        with file.open("rb") as raw:
            if file.suffix == ".gz":
                with gzip.open(raw) as stream:
                    yield from iter(lambda: stream.read(CHUNK_BYTES), b"")
            elif file.suffix == ".zst":
                yield from _zstd_chunks(raw)
            else:
                yield from iter(lambda: raw.read(CHUNK_BYTES), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise BadLine(
            "damaged file", f"{file} is damaged or cut short ({error}): fetch it again"
        ) from None


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    """All frames of a .zst; zstandard's own reader takes a truncated file for a whole one."""
    frame = None
    while chunk := raw.read(CHUNK_BYTES):
        while chunk:
            if frame is None:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the last frame has no end")
