"""Progress is visible on a terminal, in a log file and after a resume."""

import fcntl
import io
import os
import re
import select
import struct
import termios

import pytest

from easylm_jax import progress


def open_terminal(*, rows, columns):
    """A real pseudo-terminal: the stream to write to, and a function that reads what it shows."""
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read():
        parts = []
        while select.select([controller], [], [], 0)[0]:
            parts.append(os.read(controller, 4096))
        return b"".join(parts).decode()

    return open(terminal, "w"), read


@pytest.fixture
def clock(monkeypatch):
    """A clock the test moves: clock[0] is now."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"), (7500, "2 h 5 min"), (86399, "1 d 0 h"), (273600, "3 d 4 h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert progress.format_duration(seconds) == text


def test_plain_lines_are_rare_and_the_last_is_shown(clock):
    stream = io.StringIO()
    bar = progress.Progress(1000, start_step=900, stream=stream)
    for step in range(901, 1001):
        clock[0] += 1.0
        bar.update(step, loss=step / 100, tokens_per_s=12345.4)
    bar.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 21  # 100 s, one line in 5 s, and the last
    assert lines[0] == "step 901/1,000  loss 9.010  12,345 tokens/s"
    assert lines[1] == "step 906/1,000  loss 9.060  12,345 tokens/s  1 min 34 s left"
    assert lines[-1] == "step 1,000/1,000  loss 10.000  12,345 tokens/s"


def test_time_left_does_not_count_compiling_nor_steps_before_a_resume(clock):
    stream = io.StringIO()
    bar = progress.Progress(200, start_step=100, stream=stream)
    clock[0] += 300  # compiling
    bar.update(101)
    clock[0] += 60
    bar.update(111)  # 6 s a step, 89 to go
    assert stream.getvalue().splitlines()[-1] == "step 111/200  8 min 54 s left"


def test_stopping_early_shows_where(clock):
    stream = io.StringIO()
    bar = progress.Progress(100, stream=stream)
    bar.update(1, loss=3.0)
    clock[0] += 1.0
    bar.update(2)  # no new loss: the last one is kept
    bar.note("stopped by a signal")
    bar.close()
    assert stream.getvalue().splitlines()[1:] == [
        "stopped by a signal",
        "step 2/100  loss 3.000  1 min 38 s left",
    ]


def test_terminal_has_one_bar_and_notes_stand_alone():
    stream, read = open_terminal(rows=40, columns=100)
    bar = progress.Progress(1000, start_step=500, stream=stream)
    bar.update(750, loss=2.5, tokens_per_s=1e6)
    bar.note("checkpoint 750 saved")
    bar.update(1000, loss=2.25)
    bar.close()
    text = re.sub(r"\x1b\[[A-Z]", "", read()).replace("\r\n", "\n")
    shown = [part.strip() for part in re.split(r"[\r\n]", text) if part.strip()]
    assert shown[0].startswith("50%")  # the resumed half counts
    assert "checkpoint 750 saved" in shown
    assert shown[-1].startswith("100%")
    assert shown[-1].endswith("step 1,000/1,000  loss 2.250  1,000,000 tokens/s")
    assert text.count("\n") == 2  # the note and the end: the bar stays on its line


def test_terminal_without_a_size_gets_lines():
    stream, read = open_terminal(rows=0, columns=0)
    bar = progress.Progress(10, stream=stream)
    bar.update(10, loss=1.0)
    bar.close()
    assert read().splitlines() == ["step 10/10  loss 1.000"]
