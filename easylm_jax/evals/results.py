"""What samples of a task add up to, with its standard error; and the files of an evaluation.

    OUT/samples/<task>.jsonl           one line per item: what was asked, what came, its scores
    OUT/samples/<task>.settings.json   what the samples were made with; others are not mixed in
    OUT/results.json                   every number of the run, with what it takes to compare it

What it is not: it asks no model (`runner.py`) and compares no runs (`compare.py`). evaluate.py and
the trainer call it, evaluation_report.py draws what it wrote.

A sample scores (sum, weight) per metric, and a metric is a function of the ratio of their totals.
Of perplexities and bits per byte the sum is the negative log-likelihood in nats, the weight the
number of tokens, words or bytes. The standard error is that of a ratio estimator (the delta
method); where all weights are equal, it is the sample standard deviation over sqrt(n).
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from easylm_jax.evals.task import Task

Sample = Mapping[str, Any]
Results = Mapping[str, Any]

ALL = ""  # the group of a row over all items: of grouped tasks the mean over questions (micro)
MACRO = "mean over groups"  # every group counts the same, however many questions it has


# ---------------------------------------------------------------------------- sums to numbers


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of one task, over all items or over those of a group."""

    metric: str
    value: float  # nan if a score was not finite
    stderr: float | None  # of a single item it is not known
    n: int
    group: str
    shots: int
    normaliser: str
    prompt_hash: str  # of all prompts behind the number: equal where two runs asked the same


class Estimate(NamedTuple):
    """A number, its standard error (of one sample unknown), and of how many samples it is."""

    value: float
    stderr: float | None
    n: int


def summarise(task: Task, samples: Sequence[Sample], *, shots: int) -> list[Row]:
    """Every metric over all items; where there are groups, also the mean over groups, the task's
    categories of groups (MMLU's four, over questions, as in the papers), and every group."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample["group"] != ALL:
            groups.setdefault(sample["group"], []).append(sample)
    categories = {
        name: [sample for group in of_it for sample in groups.get(group, [])]
        for name, of_it in task.categories.items()
    }
    members = {ALL: samples}
    if len(groups) > 1:
        members |= {name: of_it for name, of_it in categories.items() if of_it}
        members |= {name: groups[name] for name in sorted(groups)}
    estimates: dict[tuple[str, str], Estimate] = {}
    for metric in task.metrics:
        for group, of_group in members.items():
            scores = [_score(task.name, metric, sample) for sample in of_group]
            estimates[group, metric] = estimate(metric, np.array(scores).reshape(-1, 2))
        if len(groups) > 1:
            estimates[MACRO, metric] = _macro([estimates[group, metric] for group in groups])
    return [
        Row(
            metric,
            *estimates[group, metric],
            group=group,
            shots=shots,
            normaliser=task.normaliser_of(metric),
            prompt_hash=_hash_of(members.get(group, samples)),
        )
        for group in (ALL, MACRO, *list(members)[1:])
        for metric in task.metrics
        if (group, metric) in estimates
    ]


def estimate(metric: str, scores: Float[np.ndarray, "N 2"]) -> Estimate:
    """The metric of samples that score (sum, weight). Samples of weight 0 say nothing."""
    sums, weights = scores[scores[:, 1] != 0].T
    n = len(sums)
    if n == 0:
        return Estimate(math.nan, None, 0)
    ratio = sums.sum() / weights.sum()
    value, slope = transform(metric, float(ratio))
    if n == 1 or not math.isfinite(value):
        return Estimate(value, None, n)
    residuals = sums - ratio * weights
    stderr = math.sqrt((residuals**2).sum() * n / (n - 1)) / abs(weights.sum())
    return Estimate(value, float(slope * stderr), n)


def transform(metric: str, ratio: float) -> tuple[float, float]:
    """What the metric makes of sum / weight, and the slope of that there."""
    if is_perplexity(metric):
        value = math.inf if ratio > 700 else math.exp(ratio)
        return value, value
    if metric.endswith("bits_per_byte"):
        return ratio / math.log(2), 1 / math.log(2)
    return ratio, 1.0


def is_perplexity(metric: str) -> bool:
    return metric.endswith("perplexity")


_SHARES = re.compile(
    r"(^|_)(acc|match|rate|share|failures|left_out)(_|$)|^(mc\d|pass@.*|maj@.*)$"
    r"|^(ties|flips|longer_wins|refuses|as_an_ai|empty|distinct_2)$"
)


def is_share(metric: str) -> bool:
    """Written in percent."""
    return bool(_SHARES.search(metric))


def _macro(groups: Sequence[Estimate]) -> Estimate:
    """The mean over given groups, each of which is a sample of its questions."""
    errors = [one.stderr for one in groups]
    stderr = None if None in errors else math.sqrt(sum(e**2 for e in errors)) / len(groups)
    value = sum(one.value for one in groups) / len(groups)
    return Estimate(value, stderr, sum(one.n for one in groups))


def _score(task_name: str, metric: str, sample: Sample) -> tuple[float, float]:
    """Of one sample; null, which was not finite, becomes nan."""
    if metric not in sample["scores"]:
        raise ValueError(
            f"task {task_name}: expected every sample to score {metric!r}, got only "
            f"{', '.join(sample['scores'])} for item {sample['id']}; change the task's metrics"
        )
    total, weight = (math.nan if x is None else float(x) for x in sample["scores"][metric])
    return total, weight


def _hash_of(samples: Iterable[Sample]) -> str:
    hashes = "\n".join(sorted(sample["prompt_hash"] for sample in samples))
    return hashlib.sha256(hashes.encode()).hexdigest()[:8]


# ---------------------------------------------------------------------------- files


class SampleFile:
    """The samples of one task, open for more; `known` are those that an earlier start left.

    `settings` are all that changes answers (model, precision, template ...): a file made with
    others is refused. The folder is a local one, as object stores cannot append.
    """

    def __init__(self, out_dir: epath.PathLike, task_name: str, *, settings: Mapping[str, Any]):
        path = _sample_path(out_dir, task_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known = read_samples(out_dir, task_name)
        _agree(
            path, _settings_path(out_dir, task_name), to_json(settings), started=bool(self.known)
        )
        lines = path.read_bytes() if path.exists() else b""
        self._file = path.open("ab")
        self._file.truncate(lines.rfind(b"\n") + 1)  # of a line that a kill cut short nothing stays

    def write(self, samples: Iterable[Sample]) -> None:
        lines = (json.dumps(to_json(sample), allow_nan=False) + "\n" for sample in samples)
        self._file.write("".join(lines).encode())
        self._file.flush()

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_samples(out_dir: epath.PathLike, task_name: str) -> list[dict[str, Any]]:
    """The samples of a task, the last one of every item; a line that a kill cut short is none."""
    path = _sample_path(out_dir, task_name)
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    samples = {}
    for number, line in enumerate(lines, start=1):
        try:
            sample = json.loads(line)
            samples[sample["id"]] = sample
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: expected the JSON of one sample, got "
                f"{line[:40].decode(errors='replace')!r}; delete that line to ask for it again"
            ) from error
    return list(samples.values())


def read_settings(out_dir: epath.PathLike, task_name: str) -> dict[str, Any]:
    """What the samples of a task were made with."""
    return _read_json(_settings_path(out_dir, task_name))


def write_results(out_dir: epath.PathLike, results: Results) -> None:
    """Replace OUT/results.json in one move; what is not finite becomes null."""
    path = epath.Path(out_dir) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(to_json(results), indent=1, allow_nan=False) + "\n")


def read_results(out_dir: epath.PathLike) -> dict[str, Any]:
    path = epath.Path(out_dir) / "results.json"
    if not path.exists():
        raise ValueError(
            f"expected the results of an evaluation in {path}, found no such file: pass the --out "
            "of `python -m easylm_jax.evaluate`"
        )
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, got {error}; delete it and evaluate again, samples are kept"
        ) from error


def to_json(tree: Any) -> Any:
    """Rows as dicts, numbers that are not finite as null."""
    if isinstance(tree, Row):
        return to_json(dataclasses.asdict(tree))
    if isinstance(tree, Mapping):
        return {key: to_json(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [to_json(value) for value in tree]
    if isinstance(tree, float):
        return float(tree) if math.isfinite(tree) else None
    return tree


def _sample_path(out_dir: epath.PathLike, task_name: str) -> epath.Path:
    return epath.Path(out_dir) / "samples" / f"{task_name}.jsonl"


def _settings_path(out_dir: epath.PathLike, task_name: str) -> epath.Path:
    return _sample_path(out_dir, task_name).with_suffix(".settings.json")


def _read_json(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}


def _agree(path: epath.Path, beside: epath.Path, settings: Any, *, started: bool) -> None:
    """Settings of a file that has samples are those of now; of an empty one they are noted."""
    if not started:
        _replace(beside, json.dumps(settings, indent=1) + "\n")
        return
    noted = _read_json(beside)
    for key in sorted(settings.keys() | noted.keys()):
        if settings.get(key) != noted.get(key):
            raise ValueError(
                f"{path}: expected samples made with {key} = {settings.get(key)!r}, got some made "
                f"with {noted.get(key)!r}; pass another --out, or delete the file"
            )


def _replace(path: epath.Path, text: str) -> None:
    """In one move, so that a kill leaves either the old file or the new one."""
    beside = path.parent / (path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)


# ---------------------------------------------------------------------------- the terminal's table


MAX_GROUPS = 8  # with more, the table has only categories and the mean over groups
MODELS_A_LINE = 4


def format_table(results: Results) -> str:
    """All numbers of a run with what it takes to compare them; the published ones; what a judge
    says of chat."""
    tasks = to_json(results)["tasks"]
    rows = [line for name, task in tasks.items() for line in _task_lines(name, task)]
    head = ["task", "metric", "value", "± stderr", "n", "shots", "normaliser", "prompts"]
    parts = [align([head, *rows], left=(0, 1, 6, 7))] if rows else []
    parts += _published_tables(tasks)
    parts += _chat_tables(to_json(results).get("chat") or {})
    notes = [f"{mark.upper()} {name}: {sentence}" for mark, name, sentence in problems(tasks)]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def problems(tasks: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(mark, task, sentence) for what keeps numbers from being what their names say."""
    found = []
    for name, task in tasks.items():
        if reason := why_not_whole(task):
            found.append(("failed" if task["status"] == "failed" else "partial", name, reason))
        if task.get("shortened"):
            fewer = f"{task['shortened']:,} prompts have fewer shots, to fit the model's context"
            found.append(("fewer shots", name, fewer))
    return found


def coverage(task: Mapping[str, Any]) -> str:
    """How much of its data a task has seen: "1,838", or "312 of 1,838, PARTIAL"."""
    if is_whole(task):
        return f"{task['done']:,}"
    return f"{task['done']:,} of {max(task['total'], task['available']):,}, PARTIAL"


def is_whole(task: Mapping[str, Any]) -> bool:
    """Whether nothing failed, was interrupted, or left out by a limit."""
    whole = max(task["total"], task["available"])
    return task["status"] == "whole" and task["done"] >= whole


def why_not_whole(task: Mapping[str, Any]) -> str:
    """One line; empty for a whole task."""
    if is_whole(task):
        return ""
    seen = f"{task['done']:,} of {max(task['total'], task['available']):,} items"
    if task["done"] >= task["total"] and task["status"] != "failed":
        seen += " (a limit was set)"
    reason = task.get("reason") or ""
    return f"{reason} ({seen})" if reason else seen


def shown_rows(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows for a table: every metric over all items, and of groups the headline's."""
    groups = (
        {row["group"] for row in task["rows"]} - {ALL, MACRO} - task.get("categories", {}).keys()
    )
    hidden = groups if len(groups) > MAX_GROUPS else set()
    return [
        row
        for row in task["rows"]
        if row["group"] == ALL or (row["metric"] == task["headline"] and row["group"] not in hidden)
    ]


def headline_row(task: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The number that stands for a task."""
    rows = [r for r in task["rows"] if r["group"] == ALL and r["metric"] == task["headline"]]
    return rows[0] if rows else None


class Published(NamedTuple):
    """A published number; `difference` (ours less theirs) and z only where both measure the same:
    z is over our standard error alone, as theirs is not known."""

    model: str
    value: float
    metric: str
    group: str
    shots: int | None
    source: str
    difference: float | None
    z: float | None


class Measure(NamedTuple):
    """What two numbers of a task must share to be compared."""

    group: str
    metric: str
    shots: int | None  # None: not stated


def measure_of(published: Published) -> Measure:
    return Measure(published.group, published.metric, published.shots)


def same_measure(task: Mapping[str, Any], measure: Measure) -> Mapping[str, Any] | None:
    """The task's row that measures the same."""
    for row in task["rows"]:
        if (row["group"], row["metric"]) == measure[:2] and measure.shots in (None, row["shots"]):
            return row
    return None


def beside_published(task: Mapping[str, Any]) -> list[Published]:
    found = []
    for one in task["published"]:
        row = same_measure(task, Measure(one["group"], one["metric"], one["shots"]))
        has_value = row is not None and row["value"] is not None
        difference = row["value"] - one["value"] if has_value else None
        z = difference / row["stderr"] if has_value and row["stderr"] else None
        facts = (one[k] for k in ("model", "value", "metric", "group", "shots", "source"))
        found.append(Published(*facts, difference=difference, z=z))
    return found


def published_sources(tasks: Mapping[str, Any]) -> str:
    """Where the published numbers are from, a line each."""
    models: dict[str, list[str]] = {}
    for one in [one for task in tasks.values() for one in task["published"]]:
        models.setdefault(one["source"], []).append(one["model"])
    return "\n".join(f"{', '.join(dict.fromkeys(m))}: {source}" for source, m in models.items())


def write_value(metric: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    if is_share(metric):
        return f"{100 * value:.1f} %"
    digits = 3 if abs(value) < 100 else 1 if abs(value) < 10_000 else 0
    return f"{value:,.{digits}f}"


def write_stderr(metric: str, stderr: float | None) -> str:
    if stderr is None:
        return ""
    return f"{100 * stderr:.1f}" if is_share(metric) else f"{stderr:.2g}"


def write_with_stderr(row: Mapping[str, Any] | None) -> str:
    """79.8 % ± 1.2, of a row that there may be."""
    if row is None:
        return ""
    stderr = write_stderr(row["metric"], row["stderr"])
    return write_value(row["metric"], row["value"]) + (f" ± {stderr}" if stderr else "")


def align(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """A table of text under its first row; columns named in `left` begin at one edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _task_lines(name: str, task: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for row in shown_rows(task):
        first = name if not lines else f"  {row['group']}"
        n = coverage(task) if row["group"] == ALL else f"{row['n']:,}"
        value = write_value(row["metric"], row["value"])
        stderr = write_stderr(row["metric"], row["stderr"])
        facts = [n, str(row["shots"]), row["normaliser"], row["prompt_hash"]]
        lines.append([first.rstrip(), row["metric"], value, stderr, *facts])
    return lines


_JUDGED = ("judge_score", "win_rate", "lc_win_rate", "longer_wins", "parse_failures")


def _chat_tables(chat: Mapping[str, Any]) -> list[str]:
    """Win rates or grades with what to know beside them, ratings, and what was not judged."""
    rows, ratings, reasons = [], [["Elo", "model", "rating", "95 %", "games"]], []
    found = {
        name: {r["metric"]: r for r in t["rows"] if r["group"] == ALL} for name, t in chat.items()
    }
    metrics = [metric for metric in _JUDGED if any(metric in of_it for of_it in found.values())]
    for name, told in chat.items():
        if found[name]:
            cells = [write_with_stderr(found[name].get(metric)) for metric in metrics]
            rows.append([name, told["against"] or "alone", told["judge"], *cells])
        if told.get("reason"):
            reasons.append(f"NOT JUDGED {name}: {told['reason']}")
        for model, one in told.get("elo", {}).items():
            interval = f"{one['low']:.0f} to {one['high']:.0f}"
            ratings.append([name, model, f"{one['rating']:.0f}", interval, f"{one['games']:,}"])
    tables = (
        [align([["chat", "against", "judge", *metrics], *rows], left=(0, 1, 2))] if rows else []
    )
    tables += [align(ratings, left=(0, 1))] if len(ratings) > 1 else []
    return [*tables, *(["\n".join(reasons)] if reasons else [])]


def _published_tables(tasks: Mapping[str, Any]) -> list[str]:
    """Tasks against published models, a few models a table, and where the numbers are from."""
    found = {name: beside_published(task) for name, task in tasks.items()}
    models = list(dict.fromkeys(p.model for of_task in found.values() for p in of_task))
    tables = []
    for start in range(0, len(models), MODELS_A_LINE):
        columns = models[start : start + MODELS_A_LINE]
        rows = [["published", "metric", "shots", "ours", *columns]]
        for name, of_task in found.items():
            for measure in dict.fromkeys(measure_of(p) for p in of_task if p.model in columns):
                cells = {p.model: p for p in of_task if measure_of(p) == measure}
                label = name if is_whole(tasks[name]) else f"{name} PARTIAL"
                label = f"  {measure.group}" if measure.group else label
                shots = "?" if measure.shots is None else str(measure.shots)
                ours = _ours(tasks[name], measure)
                theirs = [write_published(cells[m]) if m in cells else "" for m in columns]
                rows.append([label, measure.metric, shots, ours, *theirs])
        tables.append(align(rows, left=(0, 1)))
    if tables:
        tables[-1] += "\n(ours less theirs; z: over our standard error, theirs is not known)"
        tables.append(published_sources(tasks))
    return tables


def _ours(task: Mapping[str, Any], measure: Measure) -> str:
    same = same_measure(task, measure)
    return write_value(measure.metric, same["value"]) if same else "none"


def write_published(published: Published) -> str:
    """79.8 % (-11.4, z -10.5)"""
    text = write_value(published.metric, published.value)
    if published.difference is None:
        return text
    scale, digits = (100, 1) if is_share(published.metric) else (1, 3)
    text += f" ({scale * published.difference:+.{digits}f}"
    return text + (")" if published.z is None else f", z {published.z:+.1f})")
