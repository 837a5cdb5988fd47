"""The line that tells how far a long job is: a bar on a terminal, plain lines anywhere else.

What it is not: a log (`metrics.py` writes that). It stands in layer 1 because it imports nothing
of the package and every entry point (`train.py`, `prepare.py`) may use it. All of it goes to
stdout, so that `make train | tee log` shows and keeps the same plain lines.
"""

import io
import os
import sys
import time

from tqdm import tqdm

PLAIN_LINE_SECONDS = 5.0


def format_duration(seconds: int | float) -> str:
    """A duration in its two largest units: 7 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def _can_show_a_bar(stream: io.TextIOBase) -> bool:
    """A terminal of no size (some containers and CI have them) shows no bar: lines for it."""
    return stream.isatty() and min(os.get_terminal_size(stream.fileno())) > 0


class Progress:
    """Shows step of total, loss, tokens per second and the time left. `label`: other than steps."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        label: str = "step",
        stream: io.TextIOBase | None = None,
    ):
        self._label = label
        self._total, self._step, self._stream = total_steps, start_step, stream or sys.stdout
        self._facts: dict[str, float | None] = {"loss": None, "tokens_per_s": None}
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._last_line = -float("inf")
        self._shown_step = start_step
        self._bar = None
        if _can_show_a_bar(self._stream):
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                position=0,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% {bar} {desc}",
            )
            self._bar.set_description_str(self._line())

    def update(
        self, step: int, *, loss: float | None = None, tokens_per_s: float | None = None
    ) -> None:
        """`step` steps are done. A value left out keeps its last one."""
        now = time.monotonic()
        self._step = step
        self._first = self._first or (step, now)  # the time before it went into compiling
        self._facts["loss"] = self._facts["loss"] if loss is None else loss
        self._facts["tokens_per_s"] = tokens_per_s or self._facts["tokens_per_s"]
        if self._bar is not None:
            self._bar.set_description_str(self._line(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._last_line >= PLAIN_LINE_SECONDS:
            self._print_line()

    def note(self, text: str) -> None:
        """Print a line of its own without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Show the last state for good."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown_step != self._step:
            self._print_line()

    def _print_line(self) -> None:
        print(self._line(), file=self._stream, flush=True)
        self._last_line, self._shown_step = time.monotonic(), self._step

    def _line(self) -> str:
        parts = [f"{self._label} {self._step:,}/{self._total:,}"]
        if self._facts["loss"] is not None:
            parts.append(f"loss {self._facts['loss']:.3f}")
        if self._facts["tokens_per_s"] is not None:
            parts.append(f"{self._facts['tokens_per_s']:,.0f} tokens/s")
        if self._first is not None and self._first[0] < self._step < self._total:
            seconds_per_step = (time.monotonic() - self._first[1]) / (self._step - self._first[0])
            parts.append(f"{format_duration(seconds_per_step * (self._total - self._step))} left")
        return "  ".join(parts)
