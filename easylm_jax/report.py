"""One page about one run: `python -m easylm_jax.report --workdir=DIR` writes DIR/report.html.

What it is not: a dashboard. It reads what a run left in its workdir (config.json, command.txt,
metrics.jsonl, samples.jsonl; only metrics.jsonl must be there) and writes one HTML file that needs
nothing else: no network, no script, no image files. `train.py` calls `write_report` when it ends.

Every text that comes from a file is untrusted: jinja2 escapes it, none of it enters the SVG plots,
and the page forbids scripts and external resources by its content security policy. What a run does
not have is left out of the page. The look lives in `report.html.jinja`, the contents here.
"""

import datetime
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from etils import epath

from easylm_jax.evals.results import is_share
from easylm_jax.metrics import read_metrics, read_samples
from easylm_jax.progress import format_duration

MAX_PROMPTS = 12  # pairs of samples shown
MAX_POINTS = 1000  # points drawn of one curve
SHORT_SERIES = 60  # up to so many points every point is shown
FEW_POINTS = 8  # of so few none is cut off
PAUSE_SECONDS = 1800  # a longer gap between two lines: nothing ran, the time does not count


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Write `<workdir>/report.html` from what is there now and return its path."""
    environment = page_environment()
    workdir = epath.Path(workdir)
    rows = read_metrics(workdir)
    if not rows:
        raise ValueError(
            f"expected metrics in {workdir / 'metrics.jsonl'}, found none: "
            "pass the --workdir of a run that has logged at least one step"
        )
    page = page_contents(
        rows,
        name=workdir.name,
        samples=read_samples(workdir),
        config=_read_config(workdir / "config.json"),
        command=_read_text(workdir / "command.txt").strip().split("\n")[-1],  # the last start
    )
    path = workdir / "report.html"
    write_page(path, environment.get_template("report.html.jinja").render(page))
    return path


def page_environment() -> Any:
    """Jinja over the package's templates, which escapes all texts; asked for before any work."""
    try:
        import jinja2
        import matplotlib  # noqa: F401  (the plots import it)
    except ImportError as error:
        raise ImportError(
            f"report.html needs {error.name}, which is not installed: "
            "pip install 'easylm_jax[report]'"
        ) from error

    def load(name: str) -> str:
        return (resources.files("easylm_jax") / name).read_text(encoding="utf-8")

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(load), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def write_page(path: epath.Path, html: str) -> None:
    path.write_bytes(_CONTROL.sub("\ufffd", html).encode("utf-8", "replace"))


Number = int | float | np.number

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")  # not allowed in HTML, but models emit them


def _read_text(path: epath.Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(_read_text(path) or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: expected JSON, got {error.msg.lower()}; "
            "repair it, or delete it to make the report without the configuration"
        ) from error


# ---------------------------------------------------------------------------- what the page says


class Series(NamedTuple):
    """One metric over the run: the values where it was logged, nan where it was not finite."""

    steps: np.ndarray
    values: np.ndarray


class Known(NamedTuple):
    """How a metric is called, written (`style`: number, count, short, percent, tiny) and framed.

    `frame`: "fit" shows all; "zero" starts at zero, so that a steady speed looks steady; "falling"
    lets the steep start leave the frame where it would flatten everything after it.
    """

    title: str
    unit: str = ""
    style: str = "number"
    frame: str = "fit"


LOSS = Known("Loss", "nats per token", frame="falling")
TRAINING = {
    "train/learning_rate": Known("Learning rate", style="tiny"),
    "train/grad_norm": Known("Gradient norm"),
    "train/accuracy": Known("Next-token accuracy", style="percent"),
}
SPEED = {
    "perf/tokens_per_s": Known("Throughput", "tokens/s", "count", "zero"),
    "perf/mfu": Known("Model FLOPs utilisation", "of peak", "percent", "zero"),
    "perf/data_wait_share": Known("Waiting for data", "of the time", "percent", "zero"),
    "perf/memory_gb": Known("Memory", "GB", "short", "zero"),
}
HELD_OUT = {
    "bits_per_byte": Known("Bits per byte", frame="falling"),
    "loss": LOSS,
    "accuracy": Known("Next-token accuracy", style="percent"),
    "acc": Known("Accuracy", style="percent"),
    "acc_norm": Known("Accuracy, length-normalised", style="percent"),
    "greedy_acc": Known("Exact continuation", style="percent"),
    "exact_match": Known("Exact match", style="percent"),
    "flexible_match": Known("Exact match, last number", style="percent"),
    "pass@1": Known("Programs that pass", style="percent"),
    "mc1": Known("True answer likeliest", style="percent"),
    "mc2": Known("Probability of true answers", style="percent"),
    "perplexity": Known("Perplexity", "per token", frame="falling"),
    "word_perplexity": Known("Perplexity", "per word", frame="falling"),
    "byte_perplexity": Known("Perplexity", "per byte", frame="falling"),
    "prefers_chosen": Known("Preferred answer likelier", "per token", "percent"),
    "tells": Known("Preferred answer told by the markers", style="percent"),
    "margin": Known("Evidence of the markers", "nats"),
}
STDERR = "_stderr"  # ends the name of another quantity's standard error
CHANCE = "chance"  # what a task's accuracy is by guessing
OF_CHANCE = ("acc", "acc_norm", "mc1")  # quantities that a guess has as well
# Shown elsewhere than as a curve: in a tile, a table, a mark or a sentence.
NOT_PLOTTED = {
    "train/loss", "train/tokens", "model/parameters", "guard/skipped", "perf/step_s",
    "perf/tokens_per_s_per_device", "perf/memory_peak_gb",
}  # fmt: skip


def page_contents(
    rows: Sequence[Mapping[str, int | float]],
    *,
    name: str,
    samples: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Everything the template shows, as plain values, texts and SVG."""
    series = collect(rows)
    held_out = held_out_sets(series)
    seconds, pauses = active_time([row["time"] for row in rows])
    last_time = datetime.datetime.fromtimestamp(rows[-1]["time"], datetime.UTC)
    return {
        "name": name,
        "last_step": count(max(row["step"] for row in rows)),
        "last_line": f"{last_time:%-d %B %Y, %H:%M} UTC",
        "tiles": list(_tiles(series, held_out, seconds=seconds, pauses=pauses)),
        "loss": _loss_plot(series),
        "training": _plots(series, TRAINING),
        "held_out": _held_out_plots(held_out),
        "held_out_tables": _held_out_tables(held_out),
        "speed": _plots(series, SPEED),
        "speed_facts": list(_speed_facts(series)),
        "sources": _source_table(series),
        "samples": _sample_pairs(samples),
        "max_prompts": MAX_PROMPTS,
        "more": _plots(series, {key: Known(key) for key in _unknown(series)}),
        "config": _config_groups(config or {}),
        "command": command,
    }


def collect(rows: Sequence[Mapping[str, int | float]]) -> dict[str, Series]:
    """Rows to one series per metric; a later row of the same step wins."""
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "time") and isinstance(value, int | float):
                points.setdefault(key, {})[int(row["step"])] = float(value)
    return {
        key: Series(np.array(sorted(p)), np.array([p[step] for step in sorted(p)]))
        for key, p in points.items()
    }


def held_out_sets(series: Mapping[str, Series]) -> dict[str, dict[str, Series]]:
    """`eval/<name>/<quantity>` as {name: {quantity: series}}; a name may hold slashes."""
    sets: dict[str, dict[str, Series]] = {}
    for key, one in series.items():
        if key.startswith("eval/") and key.count("/") >= 2:
            name, quantity = key.removeprefix("eval/").rsplit("/", 1)
            sets.setdefault(name, {})[quantity] = one
    return sets


def active_time(times: Sequence[float]) -> tuple[float, int]:
    """Seconds between the lines, and how many pauses were left out (runs that were continued)."""
    gaps = np.diff(times)
    paused = gaps > max(PAUSE_SECONDS, 20 * float(np.median(gaps))) if len(gaps) else gaps > 0
    return float(gaps[~paused].sum()), int(paused.sum())


def find_spikes(loss: Series, *, window: int = 30) -> np.ndarray:
    """Steps where the loss turns not finite, or jumps far above the median of the points before."""
    finite = np.isfinite(loss.values)
    bad = ~finite
    values = loss.values[finite]
    if len(values) > window:
        before = np.lib.stride_tricks.sliding_window_view(values[:-1], window)
        median = np.median(before, axis=1)
        spread = 1.4826 * np.median(np.abs(before - median[:, None]), axis=1)  # as a deviation
        limit = median + np.maximum(8 * spread, 0.1 * np.abs(median))
        bad[np.flatnonzero(finite)[window:]] = values[window:] > limit
    begins = bad & ~np.concatenate([[False], bad[:-1]])
    return loss.steps[begins]


def _tiles(series, held_out, *, seconds: float, pauses: int) -> Iterator[dict[str, str]]:
    texts = {name: q for name, q in held_out.items() if "loss" in q}
    for name, quantities in list(texts.items())[:2]:
        quantity = "bits_per_byte" if "bits_per_byte" in quantities else "loss"
        unit = "bits per byte" if quantity == "bits_per_byte" else LOSS.unit
        label = "Held out" if len(texts) == 1 else f"Held out: {name}"
        yield _change_tile(label, quantities[quantity], unit, hero=True)
    if "train/loss" in series:
        yield _change_tile("Training loss", smooth(series["train/loss"]), LOSS.unit)
    tokens = tokens_seen(series)
    if tokens:
        yield {"label": "Tokens seen", "value": amount(tokens)}
    if "model/parameters" in series:
        parameters = series["model/parameters"].values[-1]
        ratio = tokens / parameters
        note = f"{ratio:,.1f} tokens per parameter" if ratio >= 0.1 else ""
        yield {"label": "Parameters", "value": amount(parameters), "note": note}
    if seconds:
        note = {0: "", 1: "one pause left out"}.get(pauses, f"{pauses} pauses left out")
        yield {"label": "Time", "value": format_duration(seconds), "note": note}
    if "perf/tokens_per_s" in series:
        speed = np.nanmedian(series["perf/tokens_per_s"].values)
        mfu = series.get("perf/mfu")
        note = f"{percent(np.nanmedian(mfu.values))} MFU" if mfu else ""
        yield {"label": "Speed", "value": count(speed), "unit": "tokens/s", "note": note}


def _change_tile(label: str, one: Series, unit: str, *, hero: bool = False) -> dict[str, Any]:
    steps, values = (part[np.isfinite(one.values)] for part in one)
    if len(values) == 0:
        return {"label": label, "value": "not finite"}
    note = f"from {values[0]:.2f} at step {count(steps[0])}" if len(values) > 1 else ""
    return {"label": label, "value": f"{values[-1]:.2f}", "unit": unit, "note": note, "hero": hero}


def tokens_seen(series: Mapping[str, Series]) -> Number:
    """The last `train/tokens`, or the sum over the sources."""
    if "train/tokens" in series:
        return series["train/tokens"].values[-1]
    return sum(s.values[-1] for key, s in series.items() if re.fullmatch("data/.+/tokens", key))


def _loss_plot(series: Mapping[str, Series]) -> dict[str, Any] | None:
    """The one plot over the whole width; `narrow` is the same for a phone."""
    loss = series.get("train/loss")
    if loss is None or not is_curve(loss):
        return None
    spikes = find_spikes(loss)
    guard = series.get("guard/skipped")
    skipped = guard.steps[guard.values > 0] if guard else np.array([])
    marks = dict(spikes=spikes, skipped=skipped)
    trend = smooth(loss)  # heading and tile say the same
    return {
        **_heading(LOSS._replace(title="Training loss"), {"": trend}),
        "svg": draw([Line(loss)], LOSS, inches=(10.4, 3.4), **marks),
        "narrow": draw([Line(loss)], LOSS, inches=(4.6, 2.8), **marks),
        "num_spikes": len(spikes),
        "num_skipped": len(skipped),
    }


def _plots(series: Mapping[str, Series], known: Mapping[str, Known]) -> list[dict[str, Any]]:
    return plot_grid(
        [Plot(k, {"": Line(series[key])}) for key, k in known.items() if key in series]
    )


def _held_out_plots(held_out: Mapping[str, Mapping[str, Series]]) -> list[dict[str, Any]]:
    return plot_grid(
        [
            Plot(
                known_quantity(quantity),
                {name: _line(q, quantity) for name, q in held_out.items() if quantity in q},
            )
            for quantity in _quantities(held_out)
        ]
    )


def _line(quantities: Mapping[str, Series], quantity: str) -> "Line":
    has_chance = CHANCE in quantities and quantity in OF_CHANCE
    chance = float(quantities[CHANCE].values[-1]) if has_chance else None
    return Line(quantities[quantity], quantities.get(quantity + STDERR), chance)


def known_quantity(quantity: str) -> Known:
    """How a quantity of a held-out set or a metric of a task is shown."""
    style = "percent" if is_share(quantity) else "number"
    return HELD_OUT.get(quantity, Known(quantity, style=style))


class Line(NamedTuple):
    """A curve with its standard errors, drawn as a band, and the level of chance, dotted."""

    curve: Series
    stderr: Series | None = None
    chance: float | None = None


class Plot(NamedTuple):
    known: Known
    lines: Mapping[str, Line]


def plot_grid(plots: Sequence[Plot]) -> list[dict[str, Any]]:
    """Plots for a grid of two or three columns; what is not yet a curve is left out."""
    plots = [
        (known, {name: one for name, one in lines.items() if np.isfinite(one.curve.values).any()})
        for known, lines in plots
        if any(is_curve(line.curve) for line in lines.values())
    ]
    inches = (5.0, 2.5) if len(plots) in (1, 2, 4) else (4.1, 2.3)  # as in the template
    return [
        {
            **_heading(known, {name: line.curve for name, line in lines.items()}),
            "svg": draw(list(lines.values()), known, inches=inches),
        }
        for known, lines in plots
    ]


def is_curve(series: Series) -> bool:
    return bool(np.isfinite(series.values).sum() > 1)


def _heading(known: Known, named: Mapping[str, Series]) -> dict[str, Any]:
    """Title, unit and a legend; a single series has its last value instead of the legend."""
    if list(named) == [""]:
        legend, last = [], write_number(named[""].values[-1], known.style)
    else:
        legend, last = list(named), ""
    return {"title": known.title, "unit": known.unit, "last": last, "legend": legend}


def _quantities(held_out: Mapping[str, Mapping[str, Series]]) -> list[str]:
    """Columns of the evaluation: the usual ones first, then whatever else there is."""
    found = {quantity for quantities in held_out.values() for quantity in quantities}
    found = {q for q in found if not q.endswith(STDERR) and q not in ("number", CHANCE)}
    return [q for q in HELD_OUT if q in found] + sorted(found - HELD_OUT.keys())


def _held_out_tables(held_out: Mapping[str, Mapping[str, Series]]) -> list[dict[str, Any]]:
    """One of held-out texts, one of tasks and pairs: they have no column in common."""
    texts = {name: found for name, found in held_out.items() if "loss" in found}
    others = {name: found for name, found in held_out.items() if name not in texts}
    return [_held_out_table(sets) for sets in (texts, others) if sets]


def _held_out_table(held_out: Mapping[str, Mapping[str, Series]]) -> dict[str, Any]:
    quantities = _quantities(held_out)
    columns = [known_quantity(q) for q in quantities]
    rows = []
    for name, found in held_out.items():
        cells = []
        for quantity, known in zip(quantities, columns, strict=True):
            values = found[quantity].values if quantity in found else []
            ends = [write_number(v, known.style) for v in (*values[:1], *values[-1:])]
            if ends and quantity + STDERR in found:
                error = found[quantity + STDERR].values[-1]
                ends[1] += f" \u00b1 {write_number(error, known.style)}"
            cells.append({"first": ends[0], "last": ends[1]} if ends else {})
        rows.append({"name": name, "cells": cells})
    return {"columns": columns, "rows": rows}


def _speed_facts(series: Mapping[str, Series]) -> Iterator[dict[str, str]]:
    """Medians, so that compiling and evaluation do not colour them."""
    median = {key: np.nanmedian(s.values) for key, s in series.items() if key.startswith("perf/")}
    if "perf/step_s" in median:
        yield {"value": f"{median['perf/step_s']:.3g} s", "label": "per step"}
    if "perf/tokens_per_s_per_device" in median:
        per_device = count(median["perf/tokens_per_s_per_device"])
        yield {"value": per_device, "label": "tokens/s per device"}
    if "perf/memory_peak_gb" in series:
        peak = np.nanmax(series["perf/memory_peak_gb"].values)
        yield {"value": f"{peak:.1f} GB", "label": "memory at its peak"}


def _source_table(series: Mapping[str, Series]) -> list[dict[str, Any]]:
    """Tokens drawn from each source so far and how often the source was gone through."""
    names = [k[len("data/") : -len("/tokens")] for k in series if re.fullmatch("data/.+/tokens", k)]
    tokens = {name: series[f"data/{name}/tokens"].values[-1] for name in names}
    total = sum(tokens.values())
    rows = []
    for name in sorted(names, key=tokens.get, reverse=True) if total else []:
        epochs = series.get(f"data/{name}/epochs")
        rows.append(
            {
                "name": name,
                "tokens": count(tokens[name]),
                "share": 100 * tokens[name] / total,
                "epochs": f"{epochs.values[-1]:,.2f}" if epochs else "",
            }
        )
    return rows


def _sample_pairs(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per prompt the first and the last continuation; one of them if there is only one step."""
    by_prompt: dict[str, dict[int, str]] = {}
    for sample in samples:
        text = sample["text"].removeprefix(sample["prompt"]).strip("\n")
        text = re.sub("^ (?! )", "", text)  # the blank between prompt and text, but no indentation
        by_prompt.setdefault(sample["prompt"], {}).setdefault(sample["step"], text)
    return [
        {
            "prompt": prompt,
            "texts": [
                {"step": count(step), "text": texts[step]}
                for step in sorted({min(texts), max(texts)})
            ],
        }
        for prompt, texts in by_prompt.items()
    ]


def _unknown(series: Mapping[str, Series]) -> list[str]:
    known = TRAINING.keys() | SPEED.keys() | NOT_PLOTTED
    shown = re.compile("eval/.+/.+|data/.+/(tokens|epochs)")
    return sorted(key for key in series if key not in known and not shown.fullmatch(key))


def _config_groups(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configuration flattened to `a.b = value`, in one group per top-level section."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        leaves = _flatten(value) if nested else [(key, value)]
        groups.setdefault(key if nested else "", []).extend(
            (path, json.dumps(leaf, ensure_ascii=False)) for path, leaf in leaves
        )
    return [{"name": name, "leaves": groups[name]} for name in sorted(groups, key=bool)]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# ---------------------------------------------------------------------------- numbers as text


def count(value: Number) -> str:
    """12,345"""
    return f"{value:,.0f}" if math.isfinite(value) else "not finite"


def amount(value: Number) -> str:
    """Large numbers to three digits: 950, 12.3 M, 6.74 B."""
    for limit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            digits = 2 - int(math.log10(value / limit))
            return f"{value / limit:.{digits}f}{suffix}"
    return count(value)


def percent(value: Number) -> str:
    """48.5 %, and 0.12 % where one digit would hide it."""
    return f"{100 * value:.2f} %" if 0 < abs(value) < 0.01 else f"{100 * value:.1f} %"


def write_number(value: Number, style: str) -> str:
    if not math.isfinite(value):
        return "not finite"
    if style == "percent":
        return percent(value)
    if style == "count":
        return count(value)
    if style == "short":
        return f"{value:.1f}"
    if style == "tiny" or 0 < abs(value) < 0.001 or abs(value) >= 100_000:
        return _scientific(value)
    return f"{value:.3f}"


def _scientific(value: Number) -> str:
    """3e-4 rather than 0.0003 or 3e-04."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _tick(value: Number, style: str) -> str:
    """The shortest text of an axis tick."""
    if style == "percent":
        return f"{100 * value:.4g} %"
    if style == "tiny":
        return _scientific(value)
    for limit, suffix in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            divisor = 1e3 if suffix == " k" else limit
            return f"{value / divisor:.4g}{suffix}"
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


# ---------------------------------------------------------------------------- curves


def smooth(series: Series, *, max_points: int = 400) -> Series:
    """Centred moving median over 1/30 of the run; a median, as one spike must not become a hump.

    Towards the steep start the window narrows, at the end it is cut. Short series stay as they are.
    """
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    n = len(values)
    if n <= SHORT_SERIES:
        return Series(steps, values)
    at = np.unique(np.linspace(0, n - 1, min(n, max_points)).round().astype(int))
    half = np.minimum(max(1, n // 60), at)
    medians = [np.median(values[i - h : i + h + 1]) for i, h in zip(at, half, strict=True)]
    return Series(steps[at], np.array(medians))


def thin(series: Series, *, max_points: int = MAX_POINTS) -> Series:
    """At most `max_points` points that keep the lowest and the highest of every stretch."""
    if len(series.steps) <= max_points:
        return series
    keep: list[int] = []
    for stretch in np.array_split(np.arange(len(series.steps)), max_points // 2):
        low, high = np.argmin(series.values[stretch]), np.argmax(series.values[stretch])
        keep += [int(stretch[i]) for i in sorted({low, high})]
    return Series(series.steps[keep], series.values[keep])


# matplotlib writes colours as hex; each stands for a CSS variable, so that the page's light and
# dark colours apply to the plots as well.
_COLOURS = {f"#0000a{i}": f"var(--line{i})" for i in range(6)} | {
    "#0000b0": "var(--muted)",
    "#0000b1": "var(--rule)",
    "#0000b2": "var(--warn)",
}
_LINES, (_MUTED, _RULE, _WARN) = list(_COLOURS)[:6], list(_COLOURS)[6:]


def draw(
    lines: Sequence[Line],
    known: Known,
    *,
    inches: tuple[float, float],
    spikes: np.ndarray | tuple[()] = (),
    skipped: np.ndarray | tuple[()] = (),
) -> Any:
    """Curves over steps as inline SVG without any text but numbers; safe to put into the page.

    A single long series is drawn faint under its moving median.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = [finite(line) for line in lines if np.isfinite(line.curve.values).any()]
    is_noisy = len(shown) == 1 and len(shown[0].curve.steps) > SHORT_SERIES
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot()
        for i, (one, stderr, chance) in enumerate(shown):
            colour, dashes = _LINES[i % 6], ("-", "--", ":")[i // 6 % 3]
            if stderr is not None:
                edges = [one.values - stderr.values, one.values + stderr.values]
                axes.fill_between(one.steps, *edges, color=colour, alpha=0.15, linewidth=0)
            if chance is not None:
                axes.axhline(chance, color=colour, linewidth=0.9, linestyle=(0, (1, 2.5)))
            if is_noisy:
                axes.plot(*thin(one), color=colour, alpha=0.3, linewidth=0.7)
                one = smooth(one)
            marker = "o" if len(one.steps) <= 25 else ""
            axes.plot(*thin(one), dashes, color=colour, linewidth=1.6, marker=marker, ms=2.6)
        axes.set_ylim(*frame([part for line in shown for part in extent(line)], known.frame))
        for steps, height, marker in ((spikes, 1.0, "v"), (skipped, 0.0, "x")):
            if len(steps):
                _mark(axes, steps, height=height, marker=marker)
        _dress(axes, known.style)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _inline(file.getvalue())


def finite(line: Line) -> Line:
    """Where the curve is finite; the band has no width where its standard error is not known."""
    at = np.isfinite(line.curve.values)
    curve = Series(line.curve.steps[at], line.curve.values[at])
    if line.stderr is None:
        return line._replace(curve=curve)
    known = dict(zip(line.stderr.steps.tolist(), line.stderr.values.tolist(), strict=True))
    errors = np.nan_to_num([known.get(step, 0.0) for step in curve.steps.tolist()])
    return line._replace(curve=curve, stderr=Series(curve.steps, errors))


def extent(line: Line) -> Iterator[Series]:
    """What the frame has to hold."""
    steps, values = line.curve
    yield line.curve
    if line.stderr is not None:
        yield Series(steps, values - line.stderr.values)
        yield Series(steps, values + line.stderr.values)
    if line.chance is not None:
        yield Series(steps, np.full(len(steps), line.chance))


def frame(lines: Sequence[Series], kind: str) -> tuple[float, float]:
    """Lower and upper end of the axis; see `Known`. Rare outliers of long series are cut off."""
    steps, values = (np.concatenate(parts) for parts in zip(*lines, strict=True))
    if len(values) > SHORT_SERIES:
        trend = np.concatenate([smooth(one).values for one in lines])
        outer = np.quantile(values, [0.002, 0.998])
        low, high = min(trend.min(), outer[0]), max(trend.max(), outer[1])
    else:
        low, high = values.min(), values.max()
    if kind == "zero":
        low = min(0.0, low)
    if kind == "falling" and len(values) > FEW_POINTS:
        late = values[steps >= steps.min() + 0.04 * (steps.max() - steps.min())]
        outer = np.quantile(late, [0.0, 0.998])
        if high - low > 2 * (outer[1] - outer[0]) > 0:
            high = outer[1]
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return float(low if kind == "zero" and low == 0 else low - margin), float(high + margin)


def _mark(axes: Any, steps: np.ndarray, *, height: float, marker: str) -> None:
    """Marks on the upper (1.0) or lower (0.0) edge of the frame."""
    heights, across = np.full(len(steps), height), axes.get_xaxis_transform()
    axes.plot(steps, heights, marker, color=_WARN, ms=4.5, transform=across, clip_on=False)


def _dress(axes: Any, style: str) -> None:
    """Hairlines instead of a box, few ticks, quiet colours."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_MUTED, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, "number")))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, style)))
    axes.margins(x=0.015)


def _inline(svg: str) -> Any:
    """The SVG element alone: no prologue, fixed size, fonts or colours of its own."""
    import markupsafe

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = re.sub(r' id="[a-z0-9_.]+_\d+"', "", svg)  # names of groups, the same in every plot
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return markupsafe.Markup(svg)


# ---------------------------------------------------------------------------- command line


def main(workdir: str) -> None:
    try:
        print(write_report(workdir))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":  # the flag as well: train.py, which imports this file, has its own
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    app.run(lambda argv: main(_WORKDIR.value))
