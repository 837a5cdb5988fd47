"""The store holds every document once, in one stream, readable at any place."""

import json
import random

import numpy as np
import pytest
import tensorflow_datasets as tfds

from easylm_jax.data import token_store
from easylm_jax.data.documents import Document
from easylm_jax.text.tokenizer import ByteTokenizer, load_tokenizer

TOKENIZER = load_tokenizer("bytes")


def _documents(count: int, longest: int = 300) -> list[Document]:
    rng = random.Random(0)
    return [
        Document("".join(rng.choices("abc \n\0\u00e9", k=rng.randint(1, longest))), {"id": i})
        for i in range(count)
    ]


def _write(documents, folder, **kwargs):
    settings = {"tokenizer": TOKENIZER, "validation_fraction": 0.2, "block_tokens": 64}
    return token_store.write_store(documents, str(folder), **(settings | kwargs))


def _split_stream(ids: np.ndarray) -> list[str]:
    """Texts of a stream BOS doc EOS BOS doc EOS."""
    assert ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id
    starts = np.flatnonzero(ids == TOKENIZER.bos_id)
    ends = np.flatnonzero(ids == TOKENIZER.eos_id)
    np.testing.assert_array_equal(ends[:-1] + 1, starts[1:])
    pairs = zip(starts, ends, strict=True)
    return [TOKENIZER.decode(ids[start:end]) for start, end in pairs]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "web"
    documents = _documents(200)
    documents += [documents[3]] * 5 + [Document("y", {}), Document("z" * 3000, {})]
    return folder, documents, _write(documents, folder)


def test_every_document_is_in_one_split_of_the_stream(store):
    folder, documents, info = store
    texts = {}
    for split in token_store.SPLITS:
        stream = token_store.open_tokens(str(folder), split)
        texts[split] = _split_stream(stream.read(0, stream.num_tokens))
        assert info.documents[split] == len(texts[split])
        assert info.text_bytes[split] == sum(len(t.encode()) for t in texts[split])
        assert info.tokens[split] == info.text_bytes[split] + 2 * len(texts[split])
    assert sorted(sum(texts.values(), [])) == sorted(d.text for d in documents)
    assert not set(texts["train"]) & set(texts["validation"])
    assert 0.1 < len(set(texts["validation"])) / 202 < 0.3
    assert texts["train"] != [d.text for d in documents if d.text in set(texts["train"])]


def test_the_documents_dataset_follows_the_stream(store):
    folder, documents, _ = store
    stream = token_store.open_tokens(str(folder), "train")
    expected = _split_stream(stream.read(0, stream.num_tokens))
    source = tfds.builder("documents", data_dir=folder).as_data_source(split="train")
    assert [row["text"].decode() for row in source] == expected
    by_text = {d.text: d.meta for d in documents if d.text != documents[3].text}
    for row in source:
        text = row["text"].decode()
        assert json.loads(row["meta"]) == by_text.get(text, documents[3].meta)


def test_any_stretch_reads_as_a_slice(store):
    folder, _, _ = store
    stream = token_store.open_tokens(str(folder), "train")
    whole = np.concatenate([stream.read(i, 1) for i in range(stream.num_tokens)])
    rng = random.Random(1)
    for _ in range(200):
        start = rng.randrange(stream.num_tokens)
        num_tokens = rng.randint(1, stream.num_tokens - start)
        got = stream.read(start, num_tokens)
        np.testing.assert_array_equal(got, whole[start : start + num_tokens])
        assert got.dtype == np.int32


def test_equal_documents_are_not_neighbours(store):
    folder, documents, _ = store
    for split in token_store.SPLITS:
        stream = token_store.open_tokens(str(folder), split)
        texts = _split_stream(stream.read(0, stream.num_tokens))
        places = [i for i, text in enumerate(texts) if text == documents[3].text]
        assert len(places) in (0, 6)
        assert not places or max(places) - min(places) > 10


def test_shards_and_wide_ids_change_nothing(store, tmp_path, monkeypatch):
    folder, documents, info = store

    class Wide(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab_size = 100_000

        def encode(self, text):
            return [i + 90_000 for i in super().encode(text)]

    monkeypatch.setattr(token_store, "SHARD_BYTES", 2000)
    monkeypatch.setattr(token_store, "ENCODE_CHARS", 700)
    _write(documents, tmp_path / "wide", tokenizer=Wide())
    assert len(list((tmp_path / "wide/tokens/1.0.0").glob("*train*"))) > 5
    narrow = token_store.open_tokens(str(folder), "train").read(0, info.tokens["train"])
    wide = token_store.open_tokens(str(tmp_path / "wide"), "train").read(0, info.tokens["train"])
    np.testing.assert_array_equal(np.where(wide > 90_000, wide - 90_000, wide), narrow)


def test_a_store_is_reproducible_and_never_half_there(tmp_path):
    documents = _documents(40)

    def stops():
        yield from documents[:20]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write(stops(), tmp_path / "s")
    with pytest.raises(ValueError, match="no finished token store in .*prepare"):
        token_store.open_tokens(str(tmp_path / "s"), "train")

    def killed(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write(documents, tmp_path / "s", progress=killed)
    with pytest.raises(ValueError, match="no finished token store"):
        token_store.open_tokens(str(tmp_path / "s"), "train")
    assert _write(documents, tmp_path / "s") == _write(documents, tmp_path / "t")
    streams = [token_store.open_tokens(str(tmp_path / name), "train") for name in "st"]
    first, second = (stream.read(0, stream.num_tokens) for stream in streams)
    np.testing.assert_array_equal(first, second)


def test_an_empty_split_has_no_tokens(tmp_path):
    info = _write([Document("one", {})], tmp_path / "s", validation_fraction=0.0)
    assert info.tokens == {"train": 5, "validation": 0}
    assert token_store.open_tokens(str(tmp_path / "s"), "validation").num_tokens == 0
    assert _write([], tmp_path / "none").tokens == {"train": 0, "validation": 0}
