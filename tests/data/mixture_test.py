"""Rows of the mixture: exact proportions, whole epochs, the same for any number of processes."""

import math
import random

import numpy as np
import pytest

from easylm_jax.batch import check_batch
from easylm_jax.data import token_store
from easylm_jax.data.documents import Document
from easylm_jax.data.mixture import EpochRows, Interleave, MixtureSource
from easylm_jax.data.rows import rows_to_batch
from easylm_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("bytes")
LLAMA = {"cc": 67.0, "c4": 15.0, "git": 4.5, "wiki": 4.5, "books": 4.5, "arxiv": 2.5, "se": 2.0}
WEIGHTS = {"long": 0.7, "none": 0.0, "short": 0.1, "tiny": 1.3}


def _stream(folder, name: str, num_bytes: int) -> token_store.TokenStream:
    rng = random.Random(name)
    documents = []
    while num_bytes > 0:
        size = min(num_bytes, rng.choice([1, 7, 40, 150]))
        documents.append(Document("".join(rng.choices("abcdefgh", k=size)), {}))
        num_bytes -= size
    token_store.write_store(
        documents,
        str(folder / name),
        tokenizer=TOKENIZER,
        validation_fraction=0.0,
        block_tokens=50,
    )
    return token_store.open_tokens(str(folder / name), "train")


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    sizes = {"long": 3000, "short": 900, "tiny": 300}
    return {name: _stream(folder, name, size) for name, size in sizes.items()}


def _source(streams, *, process_index=0, process_count=1, **kwargs):
    settings = {"batch_size": 24, "seq_len": 16, "seed": 3, "max_epochs": math.inf}
    settings |= kwargs
    share = settings["batch_size"] // process_count
    rows = range(process_index * share, (process_index + 1) * share)
    return MixtureSource(streams, WEIGHTS, rows=rows, **settings)


@pytest.mark.parametrize(
    "weights",
    [LLAMA, WEIGHTS, {"a": 1e-3, "b": 5.0, "c": 1 / 3}, {"only": 0.25}, {"a": 1 / 3, "b": 2 / 3}],
)
def test_every_first_rows_follow_the_weights(weights):
    interleave = Interleave(weights)
    total = sum(weights.values())
    share = np.array([weights[name] / total for name in interleave.names])
    drawn = np.zeros(len(share), int)
    for row in range(3000):
        source, number = interleave.source_row(row)
        assert number == drawn[source]  # each source counts its own rows without a gap
        drawn[source] += 1
        assert np.abs(drawn - share * (row + 1)).max() < 1.5
        assert interleave.counts(row + 1) == drawn.tolist()
    far = 10**15
    assert np.abs(np.array(interleave.counts(far)) / far - share).max() < 1e-14


@pytest.mark.parametrize("name", ["long", "short", "tiny"])
def test_an_epoch_reads_every_token_of_its_rows_once(streams, name):
    seq_len, stream = 16, streams[name]
    ring = np.tile(stream.read(0, stream.num_tokens), 3)
    rows = EpochRows(stream, name, seq_len=seq_len, seed=0)
    orders, offsets = [], []
    for epoch in range(4):
        base = epoch * rows.rows_per_epoch
        read = [rows.read(base + i) for i in range(rows.rows_per_epoch)]
        # The rows, put in stream order, are consecutive stretches of the ring.
        found = []
        starts = {bytes(ring[i : i + seq_len + 1]): i for i in range(stream.num_tokens)}
        for offset in {starts[bytes(row)] for row in read}:
            cut = [ring[offset + i * seq_len :][: seq_len + 1] for i in range(len(read))]
            if sorted(map(bytes, cut)) == sorted(map(bytes, read)):
                found.append(offset)
                places = {bytes(row): i for i, row in enumerate(cut)}
                orders.append(tuple(places[bytes(row)] for row in read))
        assert len(found) == 1
        offsets += found
    assert len(set(offsets)) > 1
    assert len(set(orders)) == 4


def test_segments_positions_and_weights_follow_bos():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = rng.integers(3, 9, (5, 20))
        rows[rng.random(rows.shape) < 0.2] = TOKENIZER.bos_id
        batch = rows_to_batch(rows, bos_id=TOKENIZER.bos_id)
        check_batch(batch, vocab_size=9)
        for b, row in enumerate(rows):
            segment, position = 0, 0
            for t in range(19):
                if row[t] == TOKENIZER.bos_id or t == 0:
                    segment, position = segment + 1, 0
                assert (batch.tokens[b, t], batch.targets[b, t]) == (row[t], row[t + 1])
                assert (batch.segment_ids[b, t], batch.positions[b, t]) == (segment, position)
                assert batch.weights[b, t] == (row[t + 1] != TOKENIZER.bos_id)
                position += 1


def test_processes_together_hold_the_batch_of_one(streams):
    whole = _source(streams)
    split = {
        count: [_source(streams, process_index=i, process_count=count) for i in range(count)]
        for count in (2, 3, 4, 8)
    }
    for _ in range(6):
        expected, metrics = whole.next()
        check_batch(expected, vocab_size=TOKENIZER.vocab_size)
        for parts in split.values():
            got = [part.next() for part in parts]
            for name in ("tokens", "targets", "weights", "segment_ids", "positions"):
                rows = np.concatenate([getattr(batch, name) for batch, _ in got])
                np.testing.assert_array_equal(rows, getattr(expected, name))
            assert all(m == metrics for _, m in got)


def test_restoring_any_step_continues_exactly(streams):
    source = _source(streams)
    states, batches = [], []
    for _ in range(15):
        states.append(source.state())
        batches.append(source.next()[0].tokens)
    for step in random.Random(0).sample(range(15), 15):
        other = _source(streams)
        other.restore(states[step])
        for batch in batches[step : step + 2]:
            np.testing.assert_array_equal(other.next()[0].tokens, batch)
    with pytest.raises(ValueError, match="another mixture"):
        _source(streams, seq_len=17).restore(states[2])


def test_metrics_count_what_was_drawn_and_warn_once(streams):
    source = _source(streams, max_epochs=2.0)
    with pytest.warns(UserWarning, match="'tiny' is read for the .* time, past max_epochs 2") as w:
        for _ in range(6):
            _, metrics = source.next()
    assert len(w) == 1
    total = 6 * 24
    share = {name: WEIGHTS[name] / 2.1 for name in ("long", "short", "tiny")}
    for name in share:
        rows = metrics[f"data/{name}/tokens"] / 16
        assert abs(rows - share[name] * total) < 1.5
        epochs = rows / (streams[name].num_tokens // 16)
        assert metrics[f"data/{name}/epochs"] == pytest.approx(epochs)


def test_too_little_text_is_named(streams):
    with pytest.raises(ValueError, match="'tiny' has .* training tokens, fewer than one row of"):
        _source(streams, seq_len=500)
