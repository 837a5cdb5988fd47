"""Mixture: rows drawn from several token streams in exact proportion; the pretraining source.

What it is not: a packer. Rows are cut from the stream wherever they fall, so none is padded.

Every row is a pure function of (settings, its number g = 0, 1, 2, ...), in three steps:

  1. `Interleave` says which source row g comes from and how many rows that source gave before.
  2. The source counts that number as epoch and row, the rows of each epoch in another order.
  3. Row r of epoch e is stream[offset(e) + r * T : + T + 1], the stream taken as a ring and
     offset(e) drawn anew, so that epochs cut the documents at other places.

The rows of step t are t * B to (t + 1) * B, split evenly over the processes. So the state is one
integer, and a run may continue with another number of processes.
"""

import warnings
from collections.abc import Mapping, Sequence

import grain
import numpy as np
from jaxtyping import Int

from easylm_jax.batch import Batch
from easylm_jax.data.rows import rows_to_batch, stable_hash
from easylm_jax.data.token_store import TokenStream

SHARE_BITS = 64  # shares are fractions of 2**64, in Python's exact integers


class Interleave:
    """Which source each row of the mixture comes from, as close to the weights as can be.

    After g rows the first source has given round(share * g); the rows left over are numbered
    afresh and dealt out to the other sources in the same way. Among any first g rows each source is
    within about one row of its share, and nothing is drawn by chance.
    """

    def __init__(self, weights: Mapping[str, float]):
        self.names = [name for name, weight in weights.items() if weight > 0]
        rest = sum(weights.values())
        self._shares = []
        for name in self.names[:-1]:
            self._shares.append(min(round(weights[name] / rest * 2**SHARE_BITS), 2**SHARE_BITS))
            rest -= weights[name]
        self._shares.append(2**SHARE_BITS)  # the last source takes all that is left

    def source_row(self, row: int) -> tuple[int, int]:
        """(source, number of the row within that source) of row `row` of the mixture."""
        source = 0
        before, after = self._given(source, row)
        while after == before:
            row -= before
            source += 1
            before, after = self._given(source, row)
        return source, before

    def _given(self, source: int, row: int) -> tuple[int, int]:
        """Rows that `source` has given before and after `row` of those left to it and the next."""
        share = self._shares[source]
        return _rounded(share * row), _rounded(share * (row + 1))

    def counts(self, num_rows: int) -> list[int]:
        """How many of the first `num_rows` rows come from each source."""
        counts = []
        for share in self._shares:
            counts.append(_rounded(share * num_rows))
            num_rows -= counts[-1]
        return counts


def _rounded(scaled: int) -> int:
    return (scaled + (1 << SHARE_BITS - 1)) >> SHARE_BITS


class EpochRows:
    """The endless rows of one source: epochs of whole rows, shuffled and cut differently each."""

    def __init__(self, stream: TokenStream, name: str, *, seq_len: int, seed: int):
        if stream.num_tokens < seq_len + 1:
            raise ValueError(
                f"source {name!r} has {stream.num_tokens} training tokens, fewer than one row of "
                f"{seq_len + 1}: use more text or a shorter seq_len"
            )
        self._stream, self._name, self._seq_len, self._seed = stream, name, seq_len, seed
        self.rows_per_epoch = stream.num_tokens // seq_len
        self._epoch, self._order, self._offset = -1, None, 0

    def read(self, number: int) -> Int[np.ndarray, " T_plus_1"]:
        epoch, index = divmod(number, self.rows_per_epoch)
        self._enter(epoch)
        start = (self._offset + self._order[index] * self._seq_len) % self._stream.num_tokens
        return self._read_ring(start, self._seq_len + 1)

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        draw = stable_hash(self._seed, self._name, epoch)
        self._offset = draw % self._stream.num_tokens
        rows = grain.MapDataset.range(self.rows_per_epoch)
        self._order = rows.shuffle(seed=draw >> 32)  # an index permutation, not a list
        self._epoch = epoch

    def _read_ring(self, start: int, num_tokens: int) -> np.ndarray:
        until_end = self._stream.num_tokens - start
        if num_tokens <= until_end:
            return self._stream.read(start, num_tokens)
        parts = self._stream.read(start, until_end), self._stream.read(0, num_tokens - until_end)
        return np.concatenate(parts)


class MixtureSource:
    """The `Source` (see `source.py`) of pretraining."""

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        weights: Mapping[str, float],
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        max_epochs: float,
        rows: Sequence[int],
    ):
        self._interleave = Interleave(weights)
        self._epochs = [
            EpochRows(streams[name], name, seq_len=seq_len, seed=seed)
            for name in self._interleave.names
        ]
        self._bos_id = next(iter(streams.values())).info.bos_id
        self._batch_size, self._seq_len, self._max_epochs = batch_size, seq_len, max_epochs
        self._rows = rows
        self.tokens_per_epoch = sum(streams[name].num_tokens for name in self._interleave.names)
        self._step = 0
        self._warned: set[str] = set()
        sizes = [(name, weights[name], streams[name].num_tokens) for name in self._interleave.names]
        self._made_of = f"{stable_hash(sizes, batch_size, seq_len, seed):016x}"

    def next(self) -> tuple[Batch, dict[str, float]]:
        first = self._step * self._batch_size
        picks = [self._interleave.source_row(first + i) for i in self._rows]
        rows = np.stack([self._epochs[source].read(number) for source, number in picks])
        self._step += 1
        return rows_to_batch(rows, bos_id=self._bos_id), self._metrics()

    def _metrics(self) -> dict[str, float]:
        """Tokens and epochs each source has given so far, over all processes."""
        metrics = {}
        counts = self._interleave.counts(self._step * self._batch_size)
        for name, rows, count in zip(self._interleave.names, self._epochs, counts, strict=True):
            epochs = count / rows.rows_per_epoch
            metrics[f"data/{name}/tokens"] = float(count * self._seq_len)
            metrics[f"data/{name}/epochs"] = epochs
            if epochs > self._max_epochs and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"source {name!r} is read for the {int(epochs) + 1}th time, past max_epochs "
                    f"{self._max_epochs:g}: lower its weight or add text",
                    stacklevel=2,
                )
        return metrics

    def describe(self) -> str:
        return f"{self.tokens_per_epoch:,} tokens of {', '.join(self._interleave.names)}"

    def state(self) -> dict[str, object]:
        return {"kind": "mixture", "step": self._step, "made_of": self._made_of}

    def restore(self, state: Mapping[str, object]) -> None:
        if (state["kind"], state["made_of"]) != ("mixture", self._made_of):
            raise ValueError(
                "the checkpoint was trained on another mixture than this config asks for (sources, "
                "weights, seed, batch size or seq_len differ): restore the old data settings, or "
                "start a new run from the checkpoint's parameters"
            )
        self._step = state["step"]
