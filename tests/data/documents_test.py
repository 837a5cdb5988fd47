"""Documents come out exactly as written, and what cannot be read is named or counted."""

import gzip
import json
import random
from collections import Counter

import pytest
import zstandard

from easylm_jax.data import documents as documents_lib


def _random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabet = 'abc \n\r\t\0\u2028\x85\u00e9\U0001f600"\\{}\ufeff'
    return ["x" + "".join(rng.choices(alphabet, k=rng.randint(0, 300))) for _ in range(count)]


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)).encode()


def _read(*paths, **kwargs):
    counts = Counter()
    found = list(documents_lib.read_documents([str(p) for p in paths], counts=counts, **kwargs))
    return found, dict(counts)


COMPRESS = {
    "": lambda b: b,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_texts_survive_compression_line_ends_and_a_byte_order_mark(
    tmp_path, monkeypatch, suffix, newline, chunk
):
    monkeypatch.setattr(documents_lib, "CHUNK_BYTES", chunk)
    texts = _random_texts(60)
    content = b"\xef\xbb\xbf" + _jsonl(texts).replace(b"\n", newline.encode())
    half = content.index(b"\n", len(content) // 2) - 5  # two members or frames, cut inside a line
    pack = COMPRESS[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(content[:half]) + pack(content[half:]))
    found, counts = _read(tmp_path / "*.jsonl*")
    assert [d.text for d in found] == texts
    assert [d.meta for d in found] == [{"id": i} for i in range(60)]
    assert counts == {}


def test_plain_text_is_one_document_and_globs_are_sorted(tmp_path):
    for name in ("b/2.txt", "a/1.txt.gz", "b/10.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = f"{name}\r\nsecond line\n".encode()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found, _ = _read(tmp_path / "*/*.*", tmp_path / "b/*.txt")
    names = ["a/1.txt.gz", "b/10.md", "b/2.txt"]
    assert [d.text for d in found] == [f"{name}\nsecond line\n" for name in names]


BAD = {
    "not JSON": b"not json at all",
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "not an object": b'["text"]',
    "no field 'text'": b'{"body": "x", "id": 3}',
    "text is not a string": b'{"text": 12}',
    "not Unicode": b'{"text": "\\ud800"}',
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_line_is_named_or_counted(tmp_path, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(_jsonl(["one"]) + b"\n" + BAD[reason] + b"\n" + _jsonl(["two", " \n"]))
    with pytest.raises(ValueError, match="x.jsonl, line 3") as caught:
        _read(path)
    assert "\n" not in str(caught.value)
    found, counts = _read(path, on_bad_line="skip")
    assert [d.text for d in found] == ["one", "two"]
    assert counts == {"empty": 1, reason: 1}


def test_a_missing_field_names_those_present(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(BAD["no field 'text'"])
    with pytest.raises(ValueError, match="no field 'text', only 'body', 'id'"):
        _read(tmp_path / "x.jsonl")
    assert _read(tmp_path / "x.jsonl", text_field="body")[0][0].text == "x"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_is_never_taken_for_a_whole_one(tmp_path, suffix):
    rng = random.Random(1)
    texts = [rng.randbytes(200).hex() for _ in range(50)]
    whole = COMPRESS[suffix](_jsonl(texts))
    (tmp_path / "next.txt").write_text("the next file")
    path = tmp_path / f"cut.jsonl{suffix}"
    for _ in range(30):
        path.write_bytes(whole[: rng.randrange(1, len(whole))])
        with pytest.raises(ValueError, match="damaged or cut short"):
            _read(path)
        found, counts = _read(tmp_path / "*", on_bad_line="skip")
        assert counts["damaged file"] == 1
        read = [d.text for d in found]
        assert read[-1] == "the next file" and read[:-1] == texts[: len(read) - 1]


def test_damage_inside_a_file_is_named(tmp_path):
    content = bytearray(gzip.compress(_jsonl([random.Random(4).randbytes(9000).hex()])))
    content[len(content) // 2] ^= 255
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or cut short"):
        _read(tmp_path / "x.jsonl.gz")
    content[5:3000] = bytes(2995)
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or cut short"):
        _read(tmp_path / "x.jsonl.gz")


@pytest.mark.parametrize("name", ["g.jsonl", "g.txt", "g.jsonl.gz", "g.jsonl.zst", "g.txt.zst"])
def test_binary_garbage_is_a_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\x00" + random.Random(2).randbytes(5000))
    with pytest.raises(ValueError, match=name):
        _read(tmp_path / name)
    assert _read(tmp_path / name, on_bad_line="skip")[0] == []


def test_no_match_names_the_glob_and_an_empty_file_has_no_document(tmp_path):
    with pytest.raises(ValueError, match=r"no file matches .*/\*.jsonl"):
        _read(tmp_path / "*.jsonl")
    (tmp_path / "e.jsonl").write_bytes(b"")
    (tmp_path / "e.txt").write_bytes(b"")
    assert _read(tmp_path / "e.*") == ([], {"empty": 1})
