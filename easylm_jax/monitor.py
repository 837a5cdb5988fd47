"""Watches a training run: takes the metrics of each step one step late, logs and shows them.

While the devices work on step n + 1, the results of step n are fetched; so the host never makes
them wait. Called by `train.py` alone, which also gets its profiler here.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax import Array

from easylm_jax.metrics import (
    MetricLog,
    Throughput,
    flops_per_token,
    memory_stats,
    peak_flops,
)
from easylm_jax.models.llama import LlamaConfig
from easylm_jax.optim import Schedule
from easylm_jax.progress import Progress


def make_throughput(
    model: LlamaConfig, batch_size: int, seq_len: int, *, peak: float | None
) -> Throughput:
    """Counts the tokens of each step, and the FLOPs of `model` for MFU, over all devices."""
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "d_model", "d_ff", "vocab_size")
    sizes = {name: getattr(model, name) for name in names}
    sizes["window"] = model.attention.sliding_window
    return Throughput(
        tokens_per_step=batch_size * seq_len,
        num_devices=jax.device_count(),
        causal_flops_per_token=flops_per_token(**sizes, seq_len=seq_len)["causal"],
        peak=peak_flops(jax.devices()[0].device_kind, peak),
    )


class Monitor:
    """`push` after each step, `flush` before anything that takes time of its own.

    `must_stop` is the sentence that ends the run, or None. It is known one step late.
    """

    def __init__(
        self,
        log: MetricLog,
        progress: Progress | None,
        throughput: Throughput,
        *,
        tokens_per_step: int,
        schedule: Schedule,
        log_every: int,
        on_bad_loss: str,
    ):
        self._log, self._progress, self._throughput = log, progress, throughput
        self._tokens_per_step = tokens_per_step
        self._schedule, self._log_every = schedule, log_every
        self._on_bad_loss = on_bad_loss
        self.must_stop: str | None = None
        self._pending: tuple[int, Mapping[str, Array], Mapping[str, float]] | None = None
        self._clock: float | None = None  # when the last step's results arrived; None: do not time
        self._losses: list[float] = []
        self._num_skipped = 0

    def note(self, text: str) -> None:
        """One line for the people watching."""
        if self._progress is not None:
            self._progress.note(text)

    def push(self, step: int, metrics: Mapping[str, Array], data: Mapping[str, float]) -> None:
        """Step number `step` was dispatched; report the one before it."""
        earlier, self._pending = self._pending, (step, metrics, data)
        if earlier:
            self._report(*earlier)

    def flush(self) -> None:
        """Report the last step now, and leave what follows out of the timing."""
        pending, self._pending = self._pending, None
        if pending:
            self._report(*pending)
        self._clock = None

    def _report(self, step: int, metrics: Mapping[str, Array], data: Mapping[str, float]) -> None:
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        now = time.perf_counter()
        if self._clock is not None:
            self._throughput.add(now - self._clock, data["data/wait_seconds"])
        self._clock = now
        if math.isfinite(values["loss"]):
            self._losses.append(values["loss"])
        if values["skipped"] or not math.isfinite(values["loss"]):
            self._bad_step(step, values)
        if step % self._log_every == 0:
            self._write(step, values, data)
        elif self._progress is not None:
            self._progress.update(step)

    def _write(self, step: int, values: dict[str, float], data: Mapping[str, float]) -> None:
        """One row: means of the loss since the last row, the rest as of this step."""
        speed = self._throughput.summary()
        values = values | {"loss": _mean(self._losses), "learning_rate": self._schedule(step - 1)}
        row: dict[str, Any] = {f"train/{k}": v for k, v in values.items() if k != "skipped"}
        row["train/tokens"] = step * self._tokens_per_step  # so far
        row |= {k: v for k, v in data.items() if k != "data/wait_seconds"}
        row |= speed | memory_stats() | {"guard/skipped": self._num_skipped}
        self._log.write(step, row)
        if self._progress is not None:
            self._progress.update(
                step, loss=values["loss"], tokens_per_s=speed.get("perf/tokens_per_s")
            )
        self._losses, self._num_skipped = [], 0

    def _bad_step(self, step: int, values: dict[str, float]) -> None:
        text = f"step {step:,} is bad: loss {values['loss']:.4g}, "
        text += f"gradient norm {values['grad_norm']:.4g}; its update was "
        text += "not made" if values["skipped"] else "made all the same"
        self._num_skipped += int(values["skipped"])
        if self._on_bad_loss == "stop":
            self.must_stop = self.must_stop or f"{text}, and guard.on_bad_loss = 'stop'"
        self.note(text)


@contextlib.contextmanager
def profiler(window: str, workdir: str, *, flush: Callable[[], None]) -> Iterator[Callable]:
    """Gives `at(step)`, to be called when `step` steps were made: "3:5" traces the 4th and 5th.

    A run that starts or ends inside the window traces its part. `flush` waits for the devices.
    """
    first, last = parse_window(window)
    tracing = False

    def at(step: int) -> None:
        nonlocal tracing
        if tracing and step == last:
            flush()
            jax.profiler.stop_trace()
            tracing = False
        elif not tracing and first <= step < last:
            jax.profiler.start_trace(f"{workdir}/profile")
            tracing = True

    try:
        yield at
    finally:
        if tracing:
            jax.profiler.stop_trace()


def parse_window(text: str) -> tuple[int, int]:
    """Of `profile`: steps made before the trace starts and when it ends; "" is no window."""
    try:
        first, last = map(int, (text or "0:0").split(":"))
    except ValueError:
        first, last = -1, -1
    if text and not 0 <= first < last:
        raise ValueError(f"profile = {text!r} is not a window of steps such as '100:105'")
    return first, last


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
