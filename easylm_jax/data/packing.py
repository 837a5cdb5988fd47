"""Packing: examples of any length into rows of T tokens, with an exact saveable state.

For fine-tuning and small runs, where examples are tokenised as they are needed; pretraining reads
stored rows (`mixture.py`). Called by `source.py` and by whatever makes examples on the fly.

An example of n ids holds n - 1 pairs (token, target). Strategies:

  stream     pairs one after another, cut wherever a row ends: no padding
  best_fit   whole examples, each into the open row whose room it fills best; the fullest row goes
             out when a new one is needed and `window` rows are open
  padded     one example per row

An example of more than T pairs is cut into chunks of T ("cut") or left out ("drop"). No target is
lost or repeated by a cut. Every process packs the same global rows and takes its share of each
batch, so the state is the same on all and the number of processes may change.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Int

from easylm_jax.batch import Batch
from easylm_jax.data.rows import stable_hash

Strategy = Literal["stream", "best_fit", "padded"]
TooLong = Literal["cut", "drop"]


class Piece(NamedTuple):
    """An example or a chunk of one; `ids[0]` is only an input, so it holds len(ids) - 1 pairs."""

    ids: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]

    @property
    def num_pairs(self) -> int:
        return len(self.ids) - 1

    def split(self, num_pairs: int) -> tuple["Piece", "Piece"]:
        """The first `num_pairs` pairs and the rest."""
        head = Piece(self.ids[: num_pairs + 1], self.weights[: num_pairs + 1])
        return head, Piece(self.ids[num_pairs:], self.weights[num_pairs:])


Row = list[Piece]


class Packer:
    """Examples in by `add`, rows out of `ready` by `take`."""

    def __init__(self, strategy: Strategy, *, seq_len: int, too_long: TooLong, window: int):
        self._strategy, self._seq_len = strategy, seq_len
        self._too_long, self._window = too_long, window
        self._open: list[Row] = []
        self._rooms: list[int] = []  # pairs that each open row can still take
        self.ready: list[Row] = []
        self.counts = Counter(cut=0, dropped=0)

    def add(self, piece: Piece) -> None:
        too_long = piece.num_pairs > self._seq_len
        if piece.num_pairs < 1 or (too_long and self._too_long == "drop"):
            self.counts["dropped"] += 1
            return
        if self._strategy == "stream":
            self._pour(piece)
            return
        self.counts["cut"] += too_long
        while piece.num_pairs > 0:
            chunk, piece = piece.split(min(piece.num_pairs, self._seq_len))
            if self._strategy == "padded":
                self.ready.append([chunk])
            else:
                self._place(chunk)

    def _pour(self, piece: Piece) -> None:
        while piece.num_pairs > 0:
            if not self._open:
                self._start_row()
            chunk, piece = piece.split(min(piece.num_pairs, self._rooms[0]))
            self._put(chunk, 0)
            self.counts["cut"] += piece.num_pairs > 0

    def _place(self, piece: Piece) -> None:
        fits = [i for i, room in enumerate(self._rooms) if room >= piece.num_pairs]
        if fits:
            best = min(fits, key=self._rooms.__getitem__)
        else:
            if len(self._open) == self._window:
                self._send(self._rooms.index(min(self._rooms)))
            best = self._start_row()
        self._put(piece, best)

    def _start_row(self) -> int:
        self._open.append([])
        self._rooms.append(self._seq_len)
        return len(self._open) - 1

    def _put(self, piece: Piece, index: int) -> None:
        self._open[index].append(piece)
        self._rooms[index] -= piece.num_pairs
        if self._rooms[index] == 0:
            self._send(index)

    def _send(self, index: int) -> None:
        self._rooms.pop(index)
        self.ready.append(self._open.pop(index))

    def take(self, num_rows: int) -> list[Row]:
        rows, self.ready = self.ready[:num_rows], self.ready[num_rows:]
        return rows

    def flush(self) -> None:
        """Send out what is still open."""
        self.ready += self._open
        self._open, self._rooms = [], []

    def state(self) -> dict[str, Any]:
        def listed(rows: list[Row]) -> list:
            return [[[p.ids.tolist(), p.weights.tolist()] for p in row] for row in rows]

        return {
            "open": listed(self._open),
            "ready": listed(self.ready),
            "counts": dict(self.counts),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        def pieces(rows: list) -> list[Row]:
            return [
                [Piece(np.array(i, np.int32), np.array(w, np.float32)) for i, w in row]
                for row in rows
            ]

        self._open, self.ready = pieces(state["open"]), pieces(state["ready"])
        self._rooms = [self._seq_len - sum(p.num_pairs for p in row) for row in self._open]
        self.counts = Counter(state["counts"])


def lay_out(rows: Sequence[Row], seq_len: int) -> Batch:
    """The packed rows as a Batch, padded at the right with segment 0."""
    shape = (len(rows), seq_len)
    tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row, start=1):
            span = slice(start, start + piece.num_pairs)
            tokens[b, span], targets[b, span] = piece.ids[:-1], piece.ids[1:]
            weights[b, span] = piece.weights[1:]
            segments[b, span], positions[b, span] = segment, np.arange(piece.num_pairs)
            start = span.stop
    return Batch(tokens, targets, weights, segments, positions)


class PackedSource:
    """The `Source` (see `source.py`) of a set of examples that fits in memory, epoch after epoch.

    `examples[i]` gives ids and weights, tokenised when asked for. Every epoch reads them in another
    order, a pure function of the seed.
    """

    def __init__(
        self,
        examples: Sequence[tuple[np.ndarray, np.ndarray]],
        *,
        strategy: Strategy,
        too_long: TooLong,
        window: int,
        batch_size: int,
        seq_len: int,
        seed: int,
        rows: Sequence[int],
        left_out: Mapping[str, int] = MappingProxyType({}),
        identity: int | None = None,
    ):
        """`left_out`, by whoever read the examples, is only reported. `identity` tells them from
        any others; where it is given they are at hand, so that an epoch can be counted."""
        self._examples, self._seed = examples, seed
        self._batch_size, self._seq_len = batch_size, seq_len
        self._rows = rows
        self._left_out = dict(left_out)
        self._new_packer = functools.partial(
            Packer, strategy, seq_len=seq_len, too_long=too_long, window=window
        )
        self._packer = self._new_packer()
        self._position = 0  # examples read so far
        made_of = (len(examples), strategy, too_long, window, seq_len, seed)
        made_of += () if identity is None else (identity,)
        self._made_of = f"{stable_hash(*made_of):x}"
        self._is_at_hand = identity is not None

    def next(self) -> tuple[Batch, dict[str, float]]:
        self._fill()
        rows = self._packer.take(self._batch_size)
        filled = sum(piece.num_pairs for row in rows for piece in row)
        metrics = {
            "data/packing_efficiency": filled / (self._batch_size * self._seq_len),
            "data/examples": float(self._position),
            "data/epochs": self._position / len(self._examples),
            "data/examples_cut": float(self._packer.counts["cut"]),
            "data/documents_left_out": float(sum(self._left_out.values())),
            "data/examples_dropped": float(self._packer.counts["dropped"]),
        }
        return lay_out([rows[i] for i in self._rows], self._seq_len), metrics

    def _fill(self) -> None:
        for position in itertools.count(self._position):
            if len(self._packer.ready) >= self._batch_size:
                break
            self._packer.add(Piece(*self._examples[self._index(position)]))
            self._position = position + 1
            if self._packer.counts["dropped"] == self._position == len(self._examples):
                raise ValueError(
                    f"none of the {self._position} examples fits in a row of seq_len "
                    f"{self._seq_len}: raise it or set too_long to 'cut'"
                )

    def _index(self, position: int) -> int:
        epoch, index = divmod(position, len(self._examples))
        order = grain.MapDataset.range(len(self._examples))
        return order.shuffle(seed=stable_hash(self._seed, epoch) >> 32)[index]

    @functools.cached_property
    def tokens_per_epoch(self) -> int | None:
        """Room of the rows that the first epoch fills; None if examples are tokenised as they come.

        Others differ by a row or so, since their order does.
        """
        if not self._is_at_hand:
            return None
        packer = self._new_packer()
        for position in range(len(self._examples)):
            packer.add(Piece(*self._examples[self._index(position)]))
        packer.flush()
        return len(packer.ready) * self._seq_len

    def describe(self) -> str:
        number = len(self._examples)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self._left_out.items())
        counted = f"{number:,} example{'s' * (number != 1)}"
        return counted + (f"; left out or cut: {reasons}" if reasons else "")

    def state(self) -> dict[str, Any]:
        packed = {"kind": "packed", "position": self._position, "made_of": self._made_of}
        return packed | self._packer.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        if (state["kind"], state["made_of"]) != ("packed", self._made_of):
            raise ValueError(
                "the checkpoint was trained on other packed data than this config asks for (number "
                "of examples, packing, seq_len or seed differ): restore the old data settings, or "
                "start a new run from the checkpoint's parameters"
            )
        self._position = state["position"]
        self._packer.restore(state)


def pack_all(examples: Iterator[Piece], *, strategy: Strategy, seq_len: int) -> list[Row]:
    """Every example once, in order, too long ones cut: for held-out data."""
    packer = Packer(strategy, seq_len=seq_len, too_long="cut", window=64)
    for piece in examples:
        packer.add(piece)
    packer.flush()
    return packer.ready
