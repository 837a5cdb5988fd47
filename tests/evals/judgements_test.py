"""Judgements: judges of known taste must come out with it, whatever seats and failures do."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from easylm_jax.evals.chat_answers import Answers, Question, read_answers
from easylm_jax.evals.judge import BIASED, Case, Judge
from easylm_jax.evals.judgements import (
    file_name,
    grade,
    judge_pairs,
    read_judge_prompts,
    read_rating,
    read_verdict,
)

DATA = Path(os.environ.get("EASYLM_SHARED", "/nowhere")) / "data" / "eval"


def judge_by(say: Callable[[Case], str], *, name: str = "j", fail_at: int = 10**9) -> Judge:
    """Answers the last case first, as servers may; raises when it has said `fail_at` things."""

    def decide(cases):
        for number, place in enumerate(reversed(range(len(cases)))):
            if number == fail_at:
                raise ValueError("the judge is gone")
            yield place, say(cases[place])

    return Judge(name, decide)


def quality(text: str) -> int:
    return int(re.search(r"worth (\d+)", text)[1])


def better(case: Case) -> str:
    """By what the messages say, so that seats and placeholders matter."""
    worth = [quality(text) for text in re.findall(r"worth \d+", case.messages[1]["content"])]
    a, b = worth[len(worth) // 2 - 1], worth[-1]  # of a's turns and of b's, the last
    return f"A says [[C]].\nFinal: [[{'A' if a > b else 'B' if b > a else 'C'}]]"


def setting(seed: int = 0, n: int = 60, turns: int = 1):
    rng = random.Random(seed)
    questions = [
        Question(str(i), tuple(f"q{i}.{t}" for t in range(turns)), rng.choice(["math", "art"]))
        for i in range(n)
    ]

    def answers(model: str) -> Answers:
        def one() -> str:
            return f"worth {rng.randrange(4)} " + "x" * rng.randrange(1, 80)

        return Answers(model, {q.id: [one() for _ in q.turns] for q in questions})

    return questions, answers("m"), answers("n")


def table(rows) -> dict:
    return {(row.metric, row.group) if row.group else row.metric: row.value for row in rows}


def test_a_judge_that_always_says_a_scores_every_pair_a_tie(tmp_path):
    questions, a, b = setting()
    report = judge_pairs(BIASED["always_a"], a, b, questions, str(tmp_path / "j.jsonl"))
    found = table(report.rows)
    assert {game.preference for game in report.games} == {0.5}
    wanted = {"win_rate": 0.5, "ties": 1, "flips": 1, "first_seat_share": 1, "longer_wins": 0.5}
    assert {name: found[name] for name in wanted} == wanted
    assert found["lc_win_rate"] == pytest.approx(0.5)


def test_a_judge_that_prefers_length_is_exposed_by_the_length_column(tmp_path):
    questions, a, b = setting(n=200)
    a = Answers(a.model, {q: [text + "x" * 20] for q, (text,) in a.turns.items()})
    found = table(judge_pairs(BIASED["longest"], a, b, questions, str(tmp_path / "j")).rows)
    assert (found["longer_wins"], found["flips"], found["first_seat_share"]) == (1, 0, 0.5)
    assert found["win_rate"] > 0.65
    assert found["lc_win_rate"] == pytest.approx(0.5, abs=0.1)


def test_a_fair_judge_gives_the_true_win_rate_by_question_turn_and_category(tmp_path):
    questions, a, b = setting(turns=2)
    report = judge_pairs(judge_by(better), a, b, questions, str(tmp_path / "j.jsonl"))

    def true(wanted=lambda q, turn: True) -> float:
        won = [
            (1 + (quality(x) > quality(y)) - (quality(x) < quality(y))) / 2
            for q in questions
            for turn, (x, y) in enumerate(zip(a.turns[q.id], b.turns[q.id], strict=True), start=1)
            if wanted(q, turn)
        ]
        return pytest.approx(sum(won) / len(won))

    found = table(report.rows)
    assert found["win_rate"] == true()
    assert found["win_rate", "math"] == true(lambda q, _: q.category == "math")
    assert found["win_rate", "turn 2"] == true(lambda _, turn: turn == 2)
    assert (found["flips"], found["parse_failures"], found["first_seat_share"]) == (0, 0, 0.5)
    assert len(report.games) == 120
    assert {row.n for row in report.rows if row.metric == "win_rate" and not row.group} == {60}
    rows = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert len(rows) == 240
    for row in rows:
        x, y = (m.turns[row["question_id"]][row["turn"] - 1] for m in (a, b))
        verdict = "a" if quality(x) > quality(y) else "b" if quality(y) > quality(x) else "tie"
        assert (row["verdict"], row["len_a"], row["len_b"]) == (verdict, len(x), len(y))
        assert (row["a"], row["b"]) == ("m", "n")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/name", "org_name"),
        ("../../evil", "_._.._evil"),
        ("..", "_"),
        ("", "_"),
        ("a\\b:c\0\n", "a_b_c__"),
        ("Llama-2_7b.Q4", "Llama-2_7b.Q4"),
    ],
)
def test_names_of_models_are_no_paths(model, expected):
    assert file_name(model) == expected


def test_judgements_without_a_verdict_are_counted_and_are_no_ties(tmp_path):
    questions, a, b = setting()

    def moody(case: Case) -> str:
        return "Hard to say." if "q1" in case.messages[1]["content"] else better(case)

    left = [q for q in questions if not q.turns[0].startswith("q1")]
    found = table(judge_pairs(judge_by(moody), a, b, questions, str(tmp_path / "1")).rows)
    without = table(judge_pairs(judge_by(better), a, b, left, str(tmp_path / "2")).rows)
    assert found["parse_failures"] == found["pairs_left_out"] == (60 - len(left)) / 60
    for name in ("win_rate", "ties", "lc_win_rate", "longer_wins", ("win_rate", "art")):
        assert found[name] == pytest.approx(without[name])
    with pytest.raises(ValueError, match=r"none of the 120 judgements of j holds .*'Hmm.'"):
        judge_pairs(judge_by(lambda _: "Hmm."), a, b, questions, str(tmp_path / "3"))
    half = judge_by(lambda case: "[[A]]" if "q1." in case.messages[1]["content"][:20] else "?")
    one = [Question("1", ("q1.0",)), Question("2", ("q2.0",))]
    assert table(judge_pairs(half, a, b, one, str(tmp_path / "4")).rows)["pairs_left_out"] == 0.5


def test_a_killed_judging_goes_on_where_it_was(tmp_path):
    questions, a, b = setting()
    path, asked = tmp_path / "deep" / "j.jsonl", []

    def counted(case: Case) -> str:
        asked.append(case)
        return better(case)

    whole = judge_pairs(judge_by(better), a, b, questions, str(tmp_path / "whole")).rows
    with pytest.raises(ValueError, match="gone"):
        judge_pairs(judge_by(counted, fail_at=47), a, b, questions, str(path))
    path.write_bytes(path.read_bytes()[:-30])  # the last line is cut off
    done = []
    again = judge_pairs(judge_by(counted), a, b, questions, str(path), on_done=done.append).rows
    assert again == whole
    assert (len(asked), done[0], sum(done)) == (47 + 120 - 46, 46, 120)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 120
    judge_pairs(judge_by(counted), a, b, questions, str(path))
    assert len(asked) == 121
    # Another judge, another answer, or the models' places changed: these are other judgements.
    judge_pairs(judge_by(counted, name="other"), a, b, questions[:5], str(path))
    changed = Answers("m", a.turns | {"7": [a.turns["7"][0].replace("x", "y")]})  # as long
    judge_pairs(judge_by(counted), changed, b, questions, str(path))
    judge_pairs(judge_by(counted), b, a, questions[:5], str(path))
    assert len(asked) == 121 + 10 + 2 + 10


def test_grades_are_means_over_turns(tmp_path):
    questions, a, _ = setting(turns=2)

    def rate(case: Case) -> str:
        worth = quality(case.answers[0])
        return f"From [[1]] to [[10]]. Rating: [[{worth + 0.5}]]" if worth else "[[11]]"

    found = table(grade(judge_by(rate), a, questions, str(tmp_path / "g")))
    worth = {(q.id, t): quality(a.turns[q.id][t]) for q in questions for t in (0, 1)}
    rated = {key: w + 0.5 for key, w in worth.items() if w}
    second = [r for (_, t), r in rated.items() if t == 1]
    assert found["judge_score"] == pytest.approx(sum(rated.values()) / len(rated))
    assert found["judge_score", "turn 2"] == pytest.approx(sum(second) / len(second))
    assert found["parse_failures"] == pytest.approx(1 - len(rated) / 120)
    assert found["words"] == 3
    with pytest.raises(ValueError, match="longest judges pairs alone"):
        grade(BIASED["longest"], a, questions, str(tmp_path / "g"))
    with pytest.raises(ValueError, match=r"none of the 120 judgements of j holds \[\[1\]\]"):
        grade(judge_by(lambda _: "ten"), a, questions, str(tmp_path / "h"))


def test_models_that_did_not_answer_are_named_before_anybody_is_asked(tmp_path):
    questions, a, b = setting()
    del b.turns["3"], b.turns["14"]
    with pytest.raises(ValueError, match=r"n has no answer to 2 of the 60 questions \(3, 14\)"):
        judge_pairs(judge_by(better), a, b, questions, str(tmp_path / "j"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, verdict, rating",
    [
        ("[[A]]", "A", None),
        ("B is not [[A]]. [[B]]", "B", None),
        ("[[C]]\n", "C", None),
        ("A", None, None),
        ("[[D]] [B] [[a]]", None, None),
        ("Rating: [[7]]", None, 7.0),
        ("[[3]]; no, [[8.5]]", None, 8.5),
        ("[[0]]", None, None),
        ("[[11]]", None, None),
        ("[[rating]]", None, None),
    ],
)
def test_verdicts_are_read(text, verdict, rating):
    assert (read_verdict(text), read_rating(text)) == (verdict, rating)


FASTCHAT = DATA / "mt_bench" / "judge_prompts.jsonl"


@pytest.mark.parametrize("path", ["", str(FASTCHAT)])
def test_judges_are_told_all_and_in_its_place(tmp_path, path):
    if path and not FASTCHAT.exists():
        pytest.skip("no FastChat prompts")
    prompts = read_judge_prompts(path) if path else read_judge_prompts()
    assert len(prompts) == 8
    questions = [
        Question("1", ("Q1", "Q2"), "x", ("REF1", "REF2")),
        Question("2", ("P1", "P2"), "x"),
    ]
    a = Answers("m", {"1": ["a {answer_b} {question}", "a2"], "2": ["a3", "a4"]})
    b = Answers("n", {"1": ["b1", "b2"], "2": ["b3", "b4"]})
    told = []

    def listen(case: Case) -> str:
        told.append(case.messages[1]["content"])
        return "[[A]] [[5]]" if "[[rating]]" in str(case) or "5" in str(case) else "[[A]]"

    judge_pairs(judge_by(listen), a, b, questions, str(tmp_path / "p"), prompts=prompts)
    first, swapped, second = told[-1], told[-2], told[-3]  # the last case is asked first
    assert re.search(r"Q1(?s:.*)REF1(?s:.*)a \{answer_b\} \{question\}(?s:.*)b1", first)
    assert re.search(r"Q1(?s:.*)REF1(?s:.*)b1(?s:.*)a \{answer_b\} \{question\}", swapped)
    parts = ["Q1", "REF1", "Q2", "REF2", "Q1", "a {answer_b} {question}", "Q2", "a2", "Q1", "b1"]
    pattern = "(?s:.*?)".join(map(re.escape, [*parts, "Q2", "b2"]))
    assert re.search(pattern, second)
    assert "REF" not in told[-5] and re.search(r"P1(?s:.*)a3(?s:.*)b3", told[-5])
    assert not any(re.search(r"\{(ref_|answer_[a12]|question_)", text) for text in told)
    told.clear()
    grade(
        judge_by(lambda c: listen(c) and "[[5]]"),
        a,
        questions,
        str(tmp_path / "g"),
        prompts=prompts,
    )
    assert len(told) == 4 and re.search(r"REF2(?s:.*)Q1(?s:.*)Q2(?s:.*)a2", told[-2])


def test_missing_prompts_are_named(tmp_path):
    questions, a, b = setting(turns=2, n=1)
    prompts = {k: v for k, v in read_judge_prompts().items() if not k[2]}
    expected = r"none of type pairwise without \{ref_answer_1\} and with \{question_2\}"
    with pytest.raises(ValueError, match=expected):
        judge_pairs(judge_by(better), a, b, questions, str(tmp_path / "j"), prompts=prompts)
    (tmp_path / "p.yaml").write_text("- {type: single, prompt_template: x}")
    with pytest.raises(ValueError, match="p.yaml has no system_prompt"):
        read_judge_prompts(str(tmp_path / "p.yaml"))


def test_answers_of_equal_length_say_nothing_of_a_taste_for_length(tmp_path):
    questions = [Question(str(i), ("?",)) for i in range(3)]
    a = Answers("m", {"0": ["worth 2"], "1": ["worth 2"], "2": ["worth 2 xx"]})
    b = Answers("n", {str(i): ["worth 1"] for i in range(3)})
    rows = judge_pairs(judge_by(better), a, b, questions, str(tmp_path / "j")).rows
    (longer,) = (row for row in rows if row.metric == "longer_wins")
    assert (longer.value, longer.n) == (1.0, 1)


def test_names_without_a_number_are_of_the_turn_that_is_judged(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "- {type: single, system_prompt: x, prompt_template: '{question} {answer}'}\n"
        "- {type: single, system_prompt: x, prompt_template: '{question_2}={question} {answer}'}"
    )
    questions, told = [Question("1", ("Q1", "Q2"))], []
    judge = judge_by(lambda case: told.append(case.messages[1]["content"]) or "[[5]]")
    prompts = read_judge_prompts(str(tmp_path / "p.yaml"))
    grade(judge, Answers("m", {"1": ["A1", "A2"]}), questions, str(tmp_path / "g"), prompts=prompts)
    assert told == ["Q2=Q2 A2", "Q1 A1"]


@pytest.mark.skipif(not DATA.exists(), reason="needs the gathered data")
def test_length_alone_prefers_vicuna_to_llama(tmp_path):
    """On published answers; GPT-4 had said 77 of 80."""
    folder = DATA / "vicuna_bench" / "model_answer"
    a, b = (read_answers(str(folder / f"answer_{m}-13b.jsonl")) for m in ("vicuna", "llama"))
    questions = [Question(i, ("?",)) for i in a.turns]
    found = table(judge_pairs(BIASED["longest"], a, b, questions, str(tmp_path / "j")).rows)
    longer = [len(a.turns[i][0]) > len(b.turns[i][0]) for i in a.turns]
    assert found["win_rate"] == sum(longer) / 80 == 0.9
    assert found["longer_wins"] == 1
    assert (round(found["words_a"]), round(found["words_b"])) == (233, 125)
