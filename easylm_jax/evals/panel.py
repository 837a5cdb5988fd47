"""The False-Promise panel: what fine-tuning changed, in one table beside the base model.

Imitation teaches a model the style that raters reward, and few facts (Gudibande et al. 2023,
arXiv:2305.15717). So preference, style and abilities stand together, each as a difference from the
base on the same items with its paired standard error. Called by evaluate.py when there is a --base.
"""

from collections.abc import Mapping
from typing import Any

from easylm_jax.evals import style
from easylm_jax.evals.compare import Comparison, student, write_p
from easylm_jax.evals.results import ALL, align, is_share, to_json, write_stderr, write_value

COLUMNS = ("", "what", "base", "tuned", "difference", "± stderr", "p")


def panel(comparison: Comparison, chat: Mapping[str, Any]) -> dict[str, Any]:
    """{"columns", "rows"} of texts: what the judge prefers, then style, then the tasks' headlines.

    `comparison` is of the base with the tuned model, `chat` that of results.json.
    """
    rows = [
        ["preference", f"{name}: {_JUDGED[row['metric']]}", "50.0 %", *_against_half(row)]
        for name, told in to_json(chat).items()
        for row in told["rows"]
        if row["metric"] in _JUDGED and row["group"] == ALL and told["against"] == "base"
    ]
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


_JUDGED = {"win_rate": "win rate", "lc_win_rate": "win rate at equal length"}


def _against_half(row: Mapping[str, Any]) -> list[str]:
    """Cells of a win rate, of which the base has the other half."""
    value, stderr = row["value"], row["stderr"]
    if value is None:
        return ["not finite", "", "", ""]
    p = student(value - 0.5, stderr, row["n"])
    return [f"{value:.1%}", f"{100 * (value - 0.5):+.1f}", write_stderr("acc", stderr), write_p(p)]


def format_panel(found: Mapping[str, Any]) -> str:
    """For the terminal."""
    return align([found["columns"], *found["rows"]], left=(0, 1))
