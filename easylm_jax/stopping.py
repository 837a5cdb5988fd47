"""Stopping a run early: SIGTERM (preemption) and Ctrl-C end it after a step, with a checkpoint.

What it is not: what happens then (`train.py`, which alone calls it). Killing is safe as well; this
only saves the steps since the last checkpoint.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
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
