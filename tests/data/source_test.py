"""The data config becomes a source; held-out data is whole; prefetching changes nothing."""

import json
import random

import numpy as np
import pytest

from easylm_jax.batch import check_batch
from easylm_jax.data import token_store
from easylm_jax.data.documents import Document
from easylm_jax.data.prefetch import Prefetch
from easylm_jax.data.source import DataConfig, heldout_batches, make_source
from easylm_jax.text.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece

TOKENIZER = load_tokenizer("bytes")
ARRAYS = ("tokens", "targets", "weights", "segment_ids", "positions")


def _texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdef", k=rng.randint(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for seed, name in enumerate(("books", "web")):
        documents = [Document(text, {}) for text in _texts(60, seed)]
        token_store.write_store(
            documents,
            str(folder / name),
            tokenizer=TOKENIZER,
            validation_fraction=0.3,
            block_tokens=100,
        )
    (folder / "tokenizer").mkdir()
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("raw") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts(50)))
    return (str(path),)


def _make(cfg, *, tokenizer=TOKENIZER, seq_len=32):
    return make_source(cfg, batch_size=4, seq_len=seq_len, tokenizer=tokenizer, rows=range(4))


def _heldout(cfg, **kwargs):
    shape = {"batch_size": 4, "seq_len": 32, "rows": range(4)} | kwargs
    return list(heldout_batches(cfg, tokenizer=TOKENIZER, **shape))


def _targets(batches) -> list[int]:
    """Targets that count, in order."""
    return [int(i) for batch in batches for i in batch.targets[batch.weights > 0]]


def _validation_stream(root: str, name: str) -> np.ndarray:
    stream = token_store.open_tokens(f"{root}/{name}", "validation")
    return stream.read(0, stream.num_tokens)


def test_heldout_tokens_are_targets_exactly_once(root):
    batches = _heldout(DataConfig(root=root))
    streams = [_validation_stream(root, name) for name in ("books", "web")]
    expected = [i for stream in streams for i in stream.tolist() if i != TOKENIZER.bos_id]
    assert _targets(batches) == expected
    for batch in batches:
        check_batch(batch, vocab_size=TOKENIZER.vocab_size)
        assert batch.tokens.shape == (4, 32)
        assert all(getattr(batch, name).dtype.itemsize == 4 for name in ARRAYS)
        assert np.all((batch.segment_ids > 0)[batch.weights > 0])
    for again, batch in zip(_heldout(DataConfig(root=root)), batches, strict=True):
        np.testing.assert_array_equal(again.tokens, batch.tokens)
    only = _targets(_heldout(DataConfig(root=root), source="web"))
    assert only == [i for i in streams[1].tolist() if i != TOKENIZER.bos_id]


def test_heldout_files_are_targets_exactly_once(files):
    cfg = DataConfig(files=files, heldout_files=files, packing="stream")
    expected = [i for t in _texts(50) for i in [*TOKENIZER.encode(t), TOKENIZER.eos_id]]
    assert _targets(_heldout(cfg)) == expected
    assert sorted(_targets(_heldout(DataConfig(files=files, heldout_files=files)))) == sorted(
        expected
    )
    assert _heldout(DataConfig(files=files)) == []


@pytest.mark.parametrize("max_batches", [None, 3])
def test_heldout_rows_split_over_processes(root, files, max_batches):
    for cfg in (DataConfig(root=root), DataConfig(files=files, heldout_files=files)):
        whole = _heldout(cfg, max_batches=max_batches)
        assert max_batches is None or len(whole) == max_batches
        parts = [_heldout(cfg, rows=[i], max_batches=max_batches) for i in range(4)]
        for batch, *split in zip(whole, *parts, strict=True):
            for name in ARRAYS:
                joined = np.concatenate([getattr(part, name) for part in split])
                np.testing.assert_array_equal(joined, getattr(batch, name))


def test_a_limited_heldout_set_sees_every_source(root):
    streams = {
        name: set(
            map(bytes, np.lib.stride_tricks.sliding_window_view(_validation_stream(root, name), 8))
        )
        for name in ("books", "web")
    }
    batches = _heldout(DataConfig(root=root), max_batches=1)
    rows = [bytes(np.ascontiguousarray(row[:8])) for batch in batches for row in batch.tokens]
    assert {name for row in rows for name in streams if row in streams[name]} == set(streams)


@pytest.mark.parametrize("kind", ["root", "files"])
def test_prefetching_changes_no_batch_and_no_state(root, files, kind):
    cfg = DataConfig(root=root) if kind == "root" else DataConfig(files=files)
    plain, ahead = _make(cfg), Prefetch(_make(cfg), depth=3)
    states = []
    for _ in range(9):
        states.append(plain.state())
        assert ahead.state() == states[-1]
        (expected, metrics), (got, got_metrics) = plain.next(), ahead.next()
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
        assert got_metrics.pop("data/wait_seconds") >= 0
        assert got_metrics == metrics
    for step in (7, 2):
        ahead.restore(states[step])
        plain.restore(states[step])
        assert ahead.state() == plain.state()
        np.testing.assert_array_equal(ahead.next()[0].tokens, plain.next()[0].tokens)
    ahead.close()


def test_an_error_in_the_thread_reaches_the_consumer(root):
    class Breaks:
        made = 0

        def next(self):
            self.made += 1
            if self.made > 2:
                raise OSError("the disk is gone")
            return self.made, {}

        def state(self):
            return {"made": self.made}

    ahead = Prefetch(Breaks(), depth=4)
    assert [ahead.next()[0] for _ in range(2)] == [1, 2]
    for _ in range(2):  # and it stays
        with pytest.raises(OSError, match="disk is gone"):
            ahead.next()
    assert ahead.state() == {"made": 2}
    ahead.close()


def test_weights_follow_the_tokens_when_none_are_given(root):
    _, metrics = _make(DataConfig(root=root)).next()
    assert set(metrics) == {
        f"data/{name}/{kind}" for kind in ("tokens", "epochs") for name in ("books", "web")
    }
    source = _make(DataConfig(root=root))
    for _ in range(12):
        _, metrics = source.next()
    assert metrics["data/books/epochs"] == pytest.approx(metrics["data/web/epochs"], rel=0.1)


def test_what_a_user_can_get_wrong_is_one_sentence(root, files, tmp_path):
    cases = [
        (DataConfig(), "needs either root .* or files"),
        (DataConfig(root=root, files=files), "needs either root .* or files"),
        (DataConfig(root=str(tmp_path / "no")), "no prepared data set in .*prepare"),
        (DataConfig(root=str(tmp_path)), "holds no prepared source"),
        (DataConfig(root=root, weights={"book": 1.0}), "no source 'book'; near it: books"),
        (DataConfig(root=root, weights={"books": 0.0}), "one of them > 0"),
        (DataConfig(root=root, weights={"books": 1.0, "web": -1.0}), "must be >= 0"),
        (DataConfig(files=(str(tmp_path / "*.txt"),)), "no file matches"),
    ]
    for cfg, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            _make(cfg)
        assert "\n" not in str(caught.value)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match="no document in .*'empty': 1"):
        _make(DataConfig(files=(str(empty),)))
    other = train_sentencepiece(_texts(200), str(tmp_path / "o.model"), vocab_size=280)
    assert isinstance(other, SentencePieceTokenizer)
    with pytest.raises(ValueError, match="tokenised by another tokenizer"):
        _make(DataConfig(root=root), tokenizer=other)


def test_a_document_longer_than_everything_and_one_of_a_single_token(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a", "b" * 5000)))
    for packing in ("stream", "best_fit", "padded"):
        cfg = DataConfig(files=(str(path),), heldout_files=(str(path),), packing=packing)
        assert sorted(_targets(_heldout(cfg))) == sorted(
            [*TOKENIZER.encode("a" + "b" * 5000), 2, 2]
        )
        check_batch(_make(cfg).next()[0], vocab_size=TOKENIZER.vocab_size)
