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

from easylm_jax.metrics import read_metrics, read_samples
from easylm_jax.progress import format_duration

MAX_PROMPTS = 12  # pairs of samples shown
MAX_POINTS = 1000  # points drawn of one curve
PAUSE_SECONDS = 1800  # a longer gap between two lines: nothing ran, the time does not count

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; report.html is put there.")


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Write `<workdir>/report.html` from what is there now and return its path."""
    try:
        import jinja2
        import matplotlib  # noqa: F401  (the plots import it; asked for here, before any work)
    except ImportError as error:
        raise ImportError(
            f"report.html needs {error.name}, which is not installed: "
            "pip install 'easylm_jax[report]'"
        ) from error
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
        command=_read_text(workdir / "command.txt").strip(),
    )
    source = (resources.files("easylm_jax") / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(source).render(page)
    path = workdir / "report.html"
    path.write_bytes(_CONTROL.sub("\ufffd", html).encode("utf-8", "replace"))
    return path


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
    """How a metric is called and written; `style` is one of number, percent, rate, bytes."""

    title: str
    unit: str = ""
    style: str = "number"


LOSS = Known("Loss", "nats per token")
TRAINING = {
    "train/learning_rate": Known("Learning rate", style="small"),
    "train/grad_norm": Known("Gradient norm"),
    "train/accuracy": Known("Next-token accuracy", style="percent"),
}
SPEED = {
    "perf/tokens_per_s": Known("Throughput", "tokens/s", "count"),
    "perf/mfu": Known("Model FLOPs utilisation", "of peak", "percent"),
    "perf/data_wait_share": Known("Waiting for data", "of the time", "percent"),
    "perf/memory_gb": Known("Memory", "GB", "short"),
}
HELD_OUT = {
    "bits_per_byte": Known("Bits per byte"),
    "loss": LOSS,
    "accuracy": Known("Accuracy", style="percent"),
}
# Shown elsewhere than as a curve: in a tile, a table, a mark or a sentence.
NOT_PLOTTED = {
    "train/loss", "train/tokens", "model/parameters", "guard/skipped", "perf/step_s",
    "perf/tokens_per_s_per_device", "perf/memory_peak_gb",
}  # fmt: skip


def page_contents(
    rows: Sequence[Mapping[str, float]],
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
        "held_out": list(_held_out_plots(held_out)),
        "held_out_table": _held_out_table(held_out),
        "speed": _plots(series, SPEED),
        "speed_facts": list(_speed_facts(series)),
        "sources": _source_table(series),
        "samples": _sample_pairs(samples),
        "max_prompts": MAX_PROMPTS,
        "more": _plots(series, {key: Known(key) for key in _unknown(series)}),
        "config": _config_groups(config or {}),
        "command": command,
    }


def collect(rows: Sequence[Mapping[str, float]]) -> dict[str, Series]:
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
    """Steps where the loss was not finite, or far above the median of the `window` before it."""
    finite = np.isfinite(loss.values)
    steps, values = loss.steps[finite], loss.values[finite]
    bad = list(loss.steps[~finite])
    if len(values) > window:
        before = np.lib.stride_tricks.sliding_window_view(values[:-1], window)
        median = np.median(before, axis=1)
        spread = 1.4826 * np.median(np.abs(before - median[:, None]), axis=1)
        limit = median + np.maximum(8 * spread, 0.1 * np.abs(median))
        bad += list(steps[window:][values[window:] > limit])
    return np.array(sorted(bad))


def _tiles(series, held_out, *, seconds: float, pauses: int) -> Iterator[dict[str, str]]:
    for name, quantities in list(held_out.items())[:2]:
        quantity = "bits_per_byte" if "bits_per_byte" in quantities else "loss"
        if quantity in quantities:
            unit = "bits per byte" if quantity == "bits_per_byte" else LOSS.unit
            yield _change_tile(f"Held out: {name}", quantities[quantity], unit, hero=True)
    if "train/loss" in series:
        yield _change_tile("Training loss", smooth(series["train/loss"]), LOSS.unit)
    tokens = tokens_seen(series)
    if tokens:
        yield {"label": "Tokens seen", "value": amount(tokens)}
    if "model/parameters" in series:
        parameters = series["model/parameters"].values[-1]
        note = f"{tokens / parameters:,.1f} tokens per parameter" if tokens else ""
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
    first, last = one.values[0], one.values[-1]
    note = f"from {first:.2f} at step {count(one.steps[0])}" if len(one.steps) > 1 else ""
    return {"label": label, "value": f"{last:.2f}", "unit": unit, "note": note, "hero": hero}


def tokens_seen(series: Mapping[str, Series]) -> float:
    """The last `train/tokens`, or the sum over the sources."""
    if "train/tokens" in series:
        return series["train/tokens"].values[-1]
    return sum(s.values[-1] for key, s in series.items() if re.fullmatch("data/.+/tokens", key))


def _loss_plot(series: Mapping[str, Series]) -> dict[str, Any] | None:
    loss = series.get("train/loss")
    if loss is None or len(loss.steps) < 2:
        return None
    spikes = find_spikes(loss)
    guard = series.get("guard/skipped")
    skipped = guard.steps[guard.values > 0] if guard else np.array([])
    plot = _plot("Training loss", LOSS, {"": loss}, spikes=spikes, skipped=skipped)
    wide = draw([loss], LOSS.style, inches=(10.4, 3.4), spikes=spikes, skipped=skipped)
    return plot | {"wide": wide, "num_spikes": len(spikes), "num_skipped": len(skipped)}


def _plots(series: Mapping[str, Series], known: Mapping[str, Known]) -> list[dict[str, Any]]:
    return [
        _plot(k.title, k, {"": series[key]})
        for key, k in known.items()
        if key in series and np.isfinite(series[key].values).sum() > 1
    ]


def _plot(title: str, known: Known, named: Mapping[str, Series], **marks) -> dict[str, Any]:
    """One plot with its heading: the last value of a single series, or a legend of several."""
    lines = list(named.values())
    values = lines[0].values[np.isfinite(lines[0].values)]
    single = len(lines) == 1
    return {
        "title": title,
        "unit": known.unit,
        "last": write_number(values[-1], known.style) if single else "",
        "legend": list(named) if any(named) else [],
        "svg": draw(lines, known.style, inches=(5.2, 2.5), **marks),
    }


def _held_out_plots(held_out: Mapping[str, Mapping[str, Series]]) -> Iterator[dict[str, Any]]:
    for quantity in _quantities(held_out):
        named = {n: q[quantity] for n, q in held_out.items() if quantity in q}
        if any(np.isfinite(s.values).sum() > 1 for s in named.values()):
            known = HELD_OUT.get(quantity, Known(quantity))
            yield _plot(known.title, known, named)


def _quantities(held_out: Mapping[str, Mapping[str, Series]]) -> list[str]:
    """Columns of the evaluation: the usual ones first, then whatever else there is."""
    found = {quantity for quantities in held_out.values() for quantity in quantities}
    return [q for q in HELD_OUT if q in found] + sorted(found - HELD_OUT.keys())


def _held_out_table(held_out: Mapping[str, Mapping[str, Series]]) -> dict[str, Any]:
    quantities = _quantities(held_out)
    columns = [HELD_OUT.get(q, Known(q)) for q in quantities]
    rows = []
    for name, found in held_out.items():
        cells = []
        for quantity, known in zip(quantities, columns, strict=True):
            values = found[quantity].values if quantity in found else []
            ends = [write_number(v, known.style) for v in (*values[:1], *values[-1:])]
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
    total = sum(tokens.values()) or 1.0
    rows = []
    for name in sorted(names, key=tokens.get, reverse=True):
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
        text = sample["text"].removeprefix(sample["prompt"])
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


def count(value: float) -> str:
    """12,345"""
    return f"{value:,.0f}" if math.isfinite(value) else "not finite"


def amount(value: float) -> str:
    """Large numbers to three digits: 950, 12.3 M, 6.74 B."""
    for limit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            digits = 2 - int(math.log10(value / limit))
            return f"{value / limit:.{digits}f}{suffix}"
    return count(value)


def percent(value: float) -> str:
    """48.5 %, and 0.12 % where one digit would hide it."""
    return f"{100 * value:.2f} %" if 0 < abs(value) < 0.01 else f"{100 * value:.1f} %"


def write_number(value: float, style: str) -> str:
    if not math.isfinite(value):
        return "not finite"
    if style == "percent":
        return percent(value)
    if style == "count":
        return count(value)
    if style == "short":
        return f"{value:.1f}"
    if style == "small" or 0 < abs(value) < 0.01 or abs(value) >= 10000:
        return f"{value:.3g}"
    return f"{value:.3f}"


def _tick(value: float, style: str) -> str:
    """The shortest text of an axis tick."""
    if style == "percent":
        return f"{100 * value:.4g} %"
    for limit, suffix in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            divisor = 1e3 if suffix == " k" else limit
            return f"{value / divisor:.4g}{suffix}"
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


# ---------------------------------------------------------------------------- curves


def smooth(series: Series) -> Series:
    """Centred moving average over about 1/30 of the run, narrower towards both ends."""
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    if len(values) == 0:
        return series
    index = np.arange(len(values))
    half = np.minimum(max(1, len(values) // 60), np.minimum(index, index[::-1]))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return Series(steps, (total[index + half + 1] - total[index - half]) / (2 * half + 1))


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
    lines: Sequence[Series],
    style: str,
    *,
    inches: tuple[float, float],
    spikes: Sequence[int] = (),
    skipped: Sequence[int] = (),
) -> Any:
    """Curves over steps as inline SVG without any text but numbers; safe to put into the page.

    A single long series is drawn faint under its moving average; the axis then fits the average
    and nearly all of the rest, and what sticks out of the frame is clipped.
    """
    import matplotlib
    from matplotlib.figure import Figure

    finite = [Series(s.steps[m], s.values[m]) for s in lines if (m := np.isfinite(s.values)).any()]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot()
        is_noisy = len(finite) == 1 and len(finite[0].steps) > 60
        for i, one in enumerate(finite):
            colour, dashes = _LINES[i % 6], ("-", "--", ":")[i // 6 % 3]
            if is_noisy:
                axes.plot(*thin(one), color=colour, alpha=0.28, linewidth=0.7)
                axes.plot(*thin(smooth(one)), color=colour, linewidth=1.6)
            else:
                marker = "o" if len(one.steps) <= 25 else ""
                axes.plot(*thin(one), dashes, color=colour, linewidth=1.6, marker=marker, ms=2.6)
        if is_noisy:
            edges = np.concatenate(
                [smooth(finite[0]).values, np.quantile(finite[0].values, [0.005, 0.99])]
            )
            margin = 0.06 * (edges.max() - edges.min()) or 0.05 * abs(edges[0]) or 1.0
            axes.set_ylim(edges.min() - margin, edges.max() + margin)
        _mark(axes, spikes, at=1.0, marker="v")
        _mark(axes, skipped, at=0.0, marker="x")
        _dress(axes, style)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _inline(file.getvalue())


def _mark(axes: Any, steps: Sequence[int], *, at: float, marker: str) -> None:
    """Marks on the upper (1.0) or lower (0.0) edge of the frame."""
    across = axes.get_xaxis_transform()
    heights = np.full(len(steps), at)
    axes.plot(steps, heights, marker, color=_WARN, ms=4.5, transform=across, clip_on=False)


def _dress(axes: Any, style: str) -> None:
    """Hairlines instead of a box, few ticks, quiet colours."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_MUTED, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
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


def main(argv: Sequence[str]) -> None:
    del argv
    try:
        print(write_report(_WORKDIR.value))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    app.run(main)
