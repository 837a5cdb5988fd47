"""Stopping a run early: on a signal, or when what it measures no longer gets better.

SIGTERM (preemption) and Ctrl-C end it after a step, with a checkpoint. Killing is safe as well;
this only saves the steps since the last checkpoint. What it is not: what happens then (`train.py`,
which alone calls it).
"""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals(check_every: int) -> Iterator[Callable[[int], bool]]:
    """Gives `asked(step)`: whether a signal came. A second Ctrl-C does what it did before.

    With several processes, one of which may have had the signal, they agree every `check_every`
    steps, so that all stop at the same step.
    """
    received = []
    old = {}

    def remember(signum: int, _: Any) -> None:
        received.append(signum)
        signal.signal(signal.SIGINT, old[signal.SIGINT])

    def asked(step: int) -> bool:
        if jax.process_count() == 1:
            return bool(received)
        if step % check_every:
            return False
        return bool(multihost_utils.process_allgather(np.array(len(received))).sum())

    old |= {s: signal.signal(s, remember) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


@dataclasses.dataclass(frozen=True)
class EarlyStopConfig:
    """End the run when a measured value has not improved for a while, and keep the best model."""

    metric: str = ""  # such as "heldout/loss" or "pairs/good/prefers_chosen"; empty: never
    patience: int = 3  # measurements in a row without a better value
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"early_stop.patience is {self.patience}; it must be 1 or more")


class EarlyStop:
    """What has been measured so far. `state` goes into checkpoints."""

    def __init__(self, cfg: EarlyStopConfig):
        self._cfg = cfg
        self.best_step: int | None = None
        self._best = 0.0
        self._without_gain = 0

    @property
    def reason(self) -> str:
        """Why the run is to end, and stays ended if it is resumed; empty: it goes on."""
        if self.best_step is None or self._without_gain < self._cfg.patience:
            return ""
        return (
            f"{self._cfg.metric} was best at step {self.best_step:,} ({self._best:.4f}) and has "
            f"not improved in {self._without_gain} measurements: stopping"
        )

    def push(self, step: int, values: Mapping[str, float]) -> bool:
        """Take the values measured at `step`; whether they are the best so far."""
        if not self._cfg.metric:
            return False
        if self._cfg.metric not in values:
            raise ValueError(
                f"early_stop.metric is {self._cfg.metric!r}, which this run does not measure; it "
                f"measures {', '.join(values) or 'nothing: set data.heldout_files'}"
            )
        value = values[self._cfg.metric]
        sign = 1 if self._cfg.higher_is_better else -1
        is_first = self.best_step is None or math.isnan(self._best)
        if is_first or sign * (value - self._best) > 0:
            self.best_step, self._best, self._without_gain = step, value, 0
            return True
        self._without_gain += 1
        return False

    def state(self) -> dict[str, Any]:
        return {
            "metric": self._cfg.metric,
            "best_step": self.best_step,
            "best": self._best,
            "since": self._without_gain,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what was measured of another metric is forgotten."""
        if state["metric"] != self._cfg.metric:
            return
        self.best_step, self._best = state["best_step"], state["best"]
        self._without_gain = state["since"]
