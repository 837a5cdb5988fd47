"""Metrics of a run: the log on disk, and what the speed of a training step means.

What it is not: it computes no loss (`objectives.py`), draws no plots (`report.py`) and knows no
model: the FLOP count takes plain integers. `train.py` and `evaluate.py` call it.

    <workdir>/metrics.jsonl   {"step": 10, "time": 1790000000.0, "train/loss": 3.21, ...} per line
    <workdir>/samples.jsonl   {"step": 10, "prompt": "...", "text": "..."} per line
    <workdir>/tensorboard/    the same as TensorBoard events

On a local disk every line is appended and flushed at once, so a killed run loses nothing. Object
stores (gs://) cannot append: there the lines are kept in memory and the whole file is rewritten at
most once a minute and at `flush()`, which the trainer calls with every checkpoint; event files are
written to a temporary folder and copied at the same moments.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat

import jax
import psutil
import tensorboardX
from etils import epath

from easylm_jax.chips import find_chip

REWRITE_SECONDS = 60.0  # object stores only


# ---------------------------------------------------------------------------- the log on disk


def read_metrics(workdir: epath.PathLike) -> list[dict[str, int | float]]:
    """All rows of `metrics.jsonl`, oldest first; values that were not finite come back as nan."""
    rows = _read_json_lines(epath.Path(workdir) / "metrics.jsonl")
    for row in rows:
        row.update(dict.fromkeys(row.pop("nonfinite", []), math.nan))
    return rows


def read_samples(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """All rows of `samples.jsonl`, oldest first."""
    return _read_json_lines(epath.Path(workdir) / "samples.jsonl")


class MetricLog:
    """Writes the metrics and text samples of one run; with `enabled=False` does nothing.

    `resume_step` is the step of the checkpoint the run continues from (-1: it starts from scratch):
    later lines were written by a run that died, and are dropped. None keeps every line.
    """

    def __init__(
        self, workdir: epath.PathLike, *, enabled: bool = True, resume_step: int | None = None
    ):
        self._enabled = enabled
        if not enabled:
            return
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._metrics = _JsonLines(workdir / "metrics.jsonl", resume_step=resume_step)
        self._samples = _JsonLines(workdir / "samples.jsonl", resume_step=resume_step)
        self._events = _EventFiles(workdir / "tensorboard", resume_step=resume_step)
        self._last_flush = time.monotonic()

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Append one row of scalars. NaN and infinity are kept as null, which is valid JSON."""
        if not self._enabled:
            return
        floats = {name: float(value) for name, value in values.items()}
        bad = [name for name, value in floats.items() if not math.isfinite(value)]
        row = {"step": int(step), "time": round(time.time(), 3)} | floats | dict.fromkeys(bad)
        self._metrics.append([row | {"nonfinite": bad} if bad else row])
        for name in floats.keys() - set(bad):
            self._events.writer.add_scalar(name, floats[name], step)
        self._flush_if_due()

    def write_text(self, step: int, samples: Iterable[Mapping[str, str]]) -> None:
        """Append samples `{"prompt", "text"}`: untrusted text, never interpreted."""
        if not self._enabled:
            return
        rows = [{"step": int(step), "prompt": s["prompt"], "text": s["text"]} for s in samples]
        self._samples.append(rows)
        for i, row in enumerate(rows):
            text = f"{row['prompt']}\n----\n{row['text']}".encode(errors="replace").decode()
            verbatim = "    " + text.replace("\n", "\n    ")  # four blanks: a Markdown code block
            self._events.writer.add_text(f"samples/{i}", verbatim, step)
        self._flush_if_due()

    def flush(self) -> None:
        """Bring everything to the workdir; call it with every checkpoint."""
        if self._enabled:
            for part in (self._metrics, self._samples, self._events):
                part.flush()
            self._last_flush = time.monotonic()

    def close(self) -> None:
        if self._enabled:
            self._events.writer.close()
            self.flush()
            self._metrics.close()
            self._samples.close()

    def _flush_if_due(self) -> None:
        if time.monotonic() - self._last_flush > REWRITE_SECONDS:
            self.flush()


def _is_object_store(path: epath.Path) -> bool:
    return "://" in str(path)


class _JsonLines:
    """One growing file of JSON lines."""

    def __init__(self, path: epath.Path, *, resume_step: int | None):
        self._path = path
        rows = _read_json_lines(path)
        if resume_step is not None:
            rows = [row for row in rows if row["step"] <= resume_step]
        self._text = _to_lines(rows)
        self._dirty = False
        if path.exists() and path.read_bytes() != self._text.encode():
            _write_whole(path, self._text)
        self._file = None if _is_object_store(path) else path.open("a")

    def append(self, rows: list[dict[str, Any]]) -> None:
        if self._file is None:
            self._text += _to_lines(rows)
            self._dirty = True
        else:
            self._file.write(_to_lines(rows))
            self._file.flush()

    def flush(self) -> None:
        if self._dirty:
            _write_whole(self._path, self._text)
            self._dirty = False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _EventFiles:
    """A TensorBoard writer; for object stores it writes beside and copies."""

    def __init__(self, folder: epath.Path, *, resume_step: int | None):
        self._folder = folder
        self._local = folder
        if _is_object_store(folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="easylm_jax_events_")
            self._local = epath.Path(self._temporary.name)
        purge = None if resume_step is None else resume_step + 1  # TensorBoard hides these steps on
        self.writer = tensorboardX.SummaryWriter(str(self._local), purge_step=purge)

    def flush(self) -> None:
        self.writer.flush()
        if self._local != self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            for file in self._local.iterdir():
                file.copy(self._folder / file.name, overwrite=True)


def _to_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _write_whole(path: epath.Path, text: str) -> None:
    """Replace a file in one move, so that a kill leaves either the old or the new one."""
    if _is_object_store(path):
        path.write_text(text)
    else:
        beside = path.parent / (path.name + ".tmp")
        beside.write_text(text)
        beside.replace(path)


def _read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; a half-written last line is left out, no file is no rows."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode(errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline follows: the writer was killed in this line
                break
            raise ValueError(
                f"{path}, line {number}: expected one JSON object, got {line[:40]!r}; "
                "delete that line"
            ) from error
    return rows


# ---------------------------------------------------------------------------- speed of a step


def peak_flops(device_kind: str, override: float | None = None) -> float | None:
    """The peak that MFU is measured against; None where it is unknown (then no MFU is reported)."""
    if override is not None:
        return override
    chip = find_chip(device_kind)
    return chip.peak_flops if chip else None


def flops_per_token(
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    d_model: int,
    d_ff: int,
    vocab_size: int,
    seq_len: int,
    window: int | None = None,
) -> dict[str, float]:
    """FLOPs of forward and backward per token of a dense LLaMA, without what remat recomputes.

    `causal` is the one that MFU means here: 6 per matmul weight (the output head included, the
    input table not; a tied table counts once, as the head) and 6 L N H T for attention, which looks
    at half of the square; or at the part of it inside a sliding window of `window` tokens. `six_n`
    leaves attention out and `full` counts the whole square (12), to compare with figures published
    that way. Packing is not considered: every row counts as one
    document of `seq_len`, like in all published figures.
    """
    attention_weights = 2 * d_model * head_dim * (num_heads + num_kv_heads)  # q and o, k and v
    weights = num_layers * (attention_weights + 3 * d_model * d_ff) + d_model * vocab_size
    window = min(seq_len, window or seq_len)
    keys = window - window**2 / (2 * seq_len)  # that a query sees, on average
    per_key = 12.0 * num_layers * num_heads * head_dim
    return {
        "six_n": 6.0 * weights,
        "causal": 6.0 * weights + per_key * keys,
        "full": 6.0 * weights + per_key * seq_len,
    }


class Throughput:
    """Speed over the steps since the last summary.

    The trainer adds each step once its result has arrived, and leaves out the first step of a
    process, which compiles. `step_s` is wall time from step to step, waiting for data included.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        num_devices: int,
        causal_flops_per_token: float,
        peak: float | None,
    ):
        self._tokens_per_step = tokens_per_step
        self._num_devices = num_devices
        self._flops_per_token = causal_flops_per_token
        self._peak = peak
        self._reset()

    def _reset(self) -> None:
        self._num_steps, self._total_s, self._data_wait_s = 0, 0.0, 0.0

    def add(self, step_s: float, data_wait_s: float) -> None:
        self._num_steps += 1
        self._total_s += step_s
        self._data_wait_s += data_wait_s

    def summary(self) -> dict[str, float]:
        """`perf/*` metrics of the steps added since the last call; empty when there were none."""
        if self._num_steps == 0:
            return {}
        tokens_per_s = self._num_steps * self._tokens_per_step / self._total_s
        per_device = tokens_per_s / self._num_devices
        values = {
            "perf/step_s": self._total_s / self._num_steps,
            "perf/tokens_per_s": tokens_per_s,
            "perf/tokens_per_s_per_device": per_device,
            "perf/data_wait_share": self._data_wait_s / self._total_s,
        }
        if self._peak is not None:
            values["perf/mfu"] = per_device * self._flops_per_token / self._peak
        self._reset()
        return values


def memory_stats() -> dict[str, float]:
    """Memory in GB (1e9 bytes): of the fullest local device, or of this process where the backend
    does not tell (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats):
        return {"perf/memory_gb": psutil.Process().memory_info().rss / 1e9}
    return {
        "perf/memory_gb": max(s["bytes_in_use"] for s in stats) / 1e9,
        "perf/memory_peak_gb": max(s["peak_bytes_in_use"] for s in stats) / 1e9,
    }
