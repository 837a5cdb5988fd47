"""The False-Promise panel: what stands in its rows, of judgements and of paired scores."""

import random

import scipy.stats

from easylm_jax.evals.chat_answers import Answers, Question
from easylm_jax.evals.compare import Comparison, Difference, Paired, write_p
from easylm_jax.evals.judge import Judge
from easylm_jax.evals.judgements import judge_pairs
from easylm_jax.evals.panel import format_panel, panel


def test_the_p_of_a_preference_is_a_sign_test_over_questions(tmp_path):
    """Turns of one question are no independent observations, and ties say nothing."""
    rng = random.Random(0)
    worth = {f"{i}.{t}": rng.choice([-1, 0, 1, 1, 1]) for i in range(30) for t in (1, 2)}
    questions = [Question(str(i), (f"{i}.1", f"{i}.2")) for i in range(30)]
    tuned = Answers("tuned", {q.id: [f"{t} +" for t in q.turns] for q in questions})
    base = Answers("base", {q.id: [f"{t} -" for t in q.turns] for q in questions})

    def decide(cases):
        for place, case in enumerate(cases):
            (name, sign), (_, other) = (answer.split() for answer in case.answers)
            assert sign != other
            score = worth[name] * (1 if sign == "+" else -1)
            yield place, f"[[{'BCA'[score + 1]}]]"

    report = judge_pairs(Judge("j", decide), tuned, base, questions, str(tmp_path / "j.jsonl"))
    sums = [worth[f"{i}.1"] + worth[f"{i}.2"] for i in range(30)]
    won, lost = sum(s > 0 for s in sums), sum(s < 0 for s in sums)
    assert 0 < lost < won < won + lost < 30
    chat = {"mt": {"judge": "j", "against": "base", "rows": report.rows, "reason": ""}}
    (row, equal_length) = panel(Comparison("a", "b", [], {}, {}), chat)["rows"]
    rate = 0.5 + sum(worth.values()) / 120
    assert row[:4] == [
        "preference", "mt: win rate", f"{100 - 100 * rate:.1f} %", f"{100 * rate:.1f} %"
    ]  # fmt: skip
    assert row[6] == write_p(scipy.stats.binomtest(won, won + lost).pvalue)
    assert equal_length[6] == ""
    assert (
        panel(Comparison("a", "b", [], {}, {}), {"mt": chat["mt"] | {"against": "x"}})["rows"] == []
    )


def test_style_stands_before_abilities_of_which_only_headlines_are_shown():
    same = Paired(0.25, 0.5, 0.25, 0.125, 0.01, 40, 2, 12)
    differences = [
        Difference("mmlu", "acc", same, 0.02),
        Difference("mmlu", "acc_norm", same, None),
        Difference("koala", "words", same, None),
    ]
    found = panel(Comparison("a", "b", differences, {}, {}), {})
    assert [row[:2] for row in found["rows"]] == [
        ["style", "koala: words per answer"],
        ["ability", "mmlu: acc"],
    ]
    assert found["rows"][1][2:] == ["25.0 %", "50.0 %", "+25.0", "12.5", "0.010"]
    assert format_panel(found).splitlines()[0].split()[-1] == "p"
