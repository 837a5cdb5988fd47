"""Prefetch: the next batches are made in a thread while the step runs.

What it is not: a source of its own. It wraps any `Source` and is one, with the state of what its
consumer has taken, not of what lies ready. Called by `train.py`.
"""

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easylm_jax.data.source import Source


class Prefetch:
    """`source`, `depth` batches ahead. An error of the thread is raised by `next`."""

    def __init__(self, source: "Source", depth: int):
        self._source, self._depth = source, depth
        self._state = source.state()
        self._pending: deque[Future] = deque()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def next(self) -> tuple[Any, dict[str, float]]:
        while len(self._pending) < self._depth:
            self._pending.append(self._executor.submit(self._make))
        started = time.perf_counter()
        batch, metrics, state = self._pending[0].result()  # an error stays at the head
        waited = time.perf_counter() - started
        self._pending.popleft()
        self._pending.append(self._executor.submit(self._make))
        self._state = state
        return batch, metrics | {"data/wait_seconds": waited}

    def _make(self) -> tuple[Any, dict[str, float], dict[str, Any]]:
        batch, metrics = self._source.next()
        return batch, metrics, self._source.state()

    def state(self) -> dict[str, Any]:
        return self._state

    def restore(self, state: Mapping[str, Any]) -> None:
        self._drop_pending()
        self._source.restore(state)
        self._state = self._source.state()

    def close(self) -> None:
        """Stop the thread after the batch it is making."""
        self._drop_pending()
        self._executor.shutdown()

    def _drop_pending(self) -> None:
        for future in self._pending:
            if not future.cancel():
                future.exception()  # wait: the source must not be used by two threads
        self._pending.clear()
