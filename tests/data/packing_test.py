"""Packing loses and repeats nothing, and continues exactly from any saved state."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from easylm_jax.batch import check_batch
from easylm_jax.data.packing import PackedSource, Packer, Piece, lay_out, pack_all

STRATEGIES = ["stream", "best_fit", "padded"]


def _examples(count: int, longest: int) -> list[Piece]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        n = int(rng.integers(1, longest))
        ids = rng.integers(3, 1000, n).astype(np.int32)
        ids[0] = 1000 + i  # tells examples apart
        made.append(Piece(ids, rng.random(n).astype(np.float32)))
    return made


def _pairs(batch) -> Counter:
    """(token, target, weight) of every place that is not padding."""
    real = batch.segment_ids > 0
    columns = batch.tokens[real], batch.targets[real], batch.weights[real]
    return Counter(zip(*map(np.ndarray.tolist, columns), strict=True))


def _expected(examples) -> Counter:
    return Counter(
        pair
        for p in examples
        for pair in zip(
            p.ids[:-1].tolist(), p.ids[1:].tolist(), p.weights[1:].tolist(), strict=True
        )
    )


def _source(examples, *, process_index=0, process_count=1, **kwargs):
    settings = {"strategy": "best_fit", "too_long": "cut", "window": 5, "batch_size": 12}
    settings |= {"seq_len": 16, "seed": 1} | kwargs
    share = settings["batch_size"] // process_count
    rows = range(process_index * share, (process_index + 1) * share)
    return PackedSource(examples, rows=rows, **settings)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_pair_is_packed_once_with_its_weight(strategy):
    examples = _examples(150, longest=50)
    rows = pack_all(iter(examples), strategy=strategy, seq_len=16)
    batch = lay_out(rows, 16)
    check_batch(batch, vocab_size=2000)
    assert _pairs(batch) == _expected(examples)
    if strategy != "stream":
        whole = {p.ids.tobytes() for p in examples if 1 <= p.num_pairs <= 16}
        assert whole <= {piece.ids.tobytes() for row in rows for piece in row}
    if strategy == "padded":
        assert all(len(row) == 1 for row in rows)
    if strategy == "stream":
        assert np.all(batch.segment_ids[:-1] > 0)
        order = np.concatenate([p.ids[:-1] for p in examples])
        np.testing.assert_array_equal(batch.tokens.ravel()[: len(order)], order)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_segments_number_the_pieces_and_positions_restart(strategy):
    rows = pack_all(iter(_examples(40, longest=30)), strategy=strategy, seq_len=16)
    batch = lay_out(rows, 16)
    for b, row in enumerate(rows):
        sizes = [piece.num_pairs for piece in row]
        segments = [s for s, n in enumerate(sizes, 1) for _ in range(n)]
        positions = [i for n in sizes for i in range(n)]
        padding = [0] * (16 - sum(sizes))
        assert batch.segment_ids[b].tolist() == segments + padding
        assert batch.positions[b].tolist() == positions + padding


def test_best_fit_wastes_little_and_holds_a_bounded_window():
    packer = Packer("best_fit", seq_len=64, too_long="cut", window=8)
    for piece in _examples(2000, longest=60):
        packer.add(piece)
        assert len(packer._open) <= 8
    filled = sum(p.num_pairs for row in packer.ready for p in row)
    efficiency = filled / (64 * len(packer.ready))
    assert efficiency > 0.9
    # The best of the open rows was taken: none of these could have been joined at the time.
    packer = Packer("best_fit", seq_len=10, too_long="cut", window=3)
    for n in (6, 8, 2, 4):
        packer.add(Piece(np.arange(n + 1), np.ones(n + 1)))
    assert [[p.num_pairs for p in row] for row in packer.ready] == [[8, 2], [6, 4]]


def test_too_long_examples_are_dropped_and_counted():
    examples = _examples(100, longest=40)
    source = _source(examples, too_long="drop", batch_size=1, strategy="padded")
    kept = [p for p in examples if 1 <= p.num_pairs <= 16]
    got = Counter()
    for _ in kept:
        batch, metrics = source.next()
        got += _pairs(batch)
    assert got == _expected(kept)
    dropped_before_the_last = metrics["data/examples_dropped"]
    assert metrics["data/examples"] == len(kept) + dropped_before_the_last
    with pytest.raises(ValueError, match="none of the .* fits in a row of seq_len 16"):
        _source([p for p in examples if p.num_pairs > 16], too_long="drop").next()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_epoch_reads_every_example_in_another_order(strategy):
    examples = [Piece(np.array([1, i]), np.ones(2)) for i in range(10, 58)]
    source = _source(examples, strategy=strategy, seq_len=4 if strategy != "padded" else 1)
    per_epoch = 48 // 12 if strategy == "padded" else 1
    epochs = []
    for _ in range(3):
        targets = [source.next()[0].targets.ravel() for _ in range(per_epoch)]
        epochs.append(np.concatenate(targets).tolist())
    assert all(sorted(epoch) == list(range(10, 58)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_restoring_any_step_continues_exactly(strategy):
    examples = _examples(70, longest=40)
    source = _source(examples, strategy=strategy)
    states, seen = [], []
    for _ in range(10):
        states.append(json.dumps(source.state()))
        seen.append(source.next())
    for step in range(10):
        other = _source(examples, strategy=strategy)
        other.restore(json.loads(states[step]))
        for batch, metrics in seen[step:]:
            got, got_metrics = other.next()
            for name in ("tokens", "targets", "weights", "segment_ids", "positions"):
                np.testing.assert_array_equal(getattr(got, name), getattr(batch, name))
            assert got_metrics == metrics
    with pytest.raises(ValueError, match="other packed data"):
        _source(examples, strategy=strategy, seed=2).restore(json.loads(states[1]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_together_hold_the_batch_of_one(strategy):
    examples = _examples(70, longest=40)
    whole = _source(examples, strategy=strategy)
    split = [
        [_source(examples, strategy=strategy, process_index=i, process_count=n) for i in range(n)]
        for n in (2, 3, 4)
    ]
    for _ in range(5):
        expected, metrics = whole.next()
        for parts in split:
            got = [part.next() for part in parts]
            for name in ("tokens", "targets", "weights", "segment_ids", "positions"):
                rows = np.concatenate([getattr(batch, name) for batch, _ in got])
                np.testing.assert_array_equal(rows, getattr(expected, name))
            assert all(m == metrics for _, m in got)
            assert all(part.state() == whole.state() for part in parts)
        real = np.mean(expected.segment_ids > 0)
        assert metrics["data/packing_efficiency"] == pytest.approx(real)


def test_weights_of_random_documents_survive_many_cuts():
    rng = random.Random(3)
    piece = Piece(np.arange(1000, dtype=np.int32), np.linspace(0, 1, 1000, dtype=np.float32))
    for _ in range(20):
        seq_len = rng.randint(1, 90)
        batch = lay_out(pack_all(iter([piece]), strategy="best_fit", seq_len=seq_len), seq_len)
        assert _pairs(batch) == _expected([piece])
