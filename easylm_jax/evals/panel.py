"""The False-Promise panel: what fine-tuning changed, in one table beside the base model.

Imitation teaches a model the style that raters reward, and few facts (Gudibande et al. 2023,
arXiv:2305.15717). So preference, style and abilities stand together, each as a difference from the
base on the same items with its paired standard error. Called by evaluate.py when there is a --base.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from easylm_jax.evals import style
from easylm_jax.evals.compare import Comparison, mcnemar, write_p
from easylm_jax.evals.results import ALL, align, is_share, to_json, write_stderr, write_value

COLUMNS = ("", "what", "base", "tuned", "difference", "± stderr", "p")


def panel(comparison: Comparison, chat: Mapping[str, Any]) -> dict[str, Any]:
    """{"columns", "rows"} of texts: what the judge prefers, then style, then the tasks' headlines.

    `comparison` is of the base with the tuned model, `chat` that of results.json.
    """
    rows = []
    for name, told in to_json(chat).items():
        found = {row["metric"]: row for row in told["rows"] if row["group"] == ALL}
        if told["against"] == "base" and found:
            rows += _preferences(name, found)
    for kind in ("style", "ability"):
        for task, metric, paired, p_holm in comparison.differences:
            is_style = metric in style.ABOUT
            if is_style != (kind == "style") or not (is_style or p_holm is not None):
                continue
            scale, digits = (100, 1) if is_share(metric) else (1, 3)
            rows.append(
                [
                    kind,
                    f"{task}: {style.ABOUT[metric] if is_style else metric}",
                    write_value(metric, paired.a),
                    write_value(metric, paired.b),
                    f"{scale * paired.difference:+.{digits}f}",
                    write_stderr(metric, paired.stderr),
                    write_p(paired.p),
                ]
            )
    return {"columns": list(COLUMNS), "rows": rows}


def _preferences(name: str, found: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Win rates, of which the base has the rest; p is of the sign test, over questions without ties
    (of several turns the mean, as they are no independent observations)."""
    for metric, words in (("win_rate", "win rate"), ("lc_win_rate", "win rate at equal length")):
        value, stderr = found[metric]["value"], found[metric]["stderr"]
        if value is None:
            continue
        p = ""
        if metric == "win_rate":
            p = write_p(mcnemar(_count(found["won_share"]), _count(found["lost_share"])))
        cells = [write_value(metric, value), f"{100 * (2 * value - 1):+.1f}"]
        cells += [write_stderr(metric, stderr and 2 * stderr), p]
        yield ["preference", f"{name}: {words}", write_value(metric, 1 - value), *cells]


def _count(share: Mapping[str, Any]) -> int:
    """Of how many questions it is the share."""
    return round(share["n"] * share["value"])


def format_panel(found: Mapping[str, Any]) -> str:
    """For the terminal."""
    return align([found["columns"], *found["rows"]], left=(0, 1))
