"""Judgements of answers: of pairs, with both seats played, and grades; and what they come to.

    report = judge_pairs(judge, answers, opponents, questions, "judgements/koala.jsonl")
    report.rows       # win rate, length-controlled win rate, and how far the judge leans
    grade(judge, answers, questions, "grades/koala.jsonl")      # 1 to 10, without an opponent

Every pair is judged twice, with either answer in the first seat; if the two verdicts are not the
same, the pair is a tie. A judgement without a verdict is no tie: its pair counts nowhere, and is
counted as such. Judgements are appended to the file as they come, and asked for once.

What it is not: a judge (`judge.py`), or the statistics (`win_rate.py`). Called by evaluate.py.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from easylm_jax.data.readers import read_records
from easylm_jax.evals.chat_answers import Answers, Question, align
from easylm_jax.evals.judge import BIASED, Case, Judge, shorten
from easylm_jax.evals.results import ALL, Estimate, Row
from easylm_jax.evals.win_rate import Game, length_controlled, mean

PROMPTS = str(pathlib.Path(__file__).parent / "judge_prompts.yaml")

Judgement = dict[str, Any]  # a line of the file
OnDone = Callable[[int], None]


# -------------------------------------------------------------------------------------- prompts


class JudgePrompt(NamedTuple):
    system: str
    template: str


Prompts = Mapping[tuple[str, bool, bool], JudgePrompt]  # type, has a reference, is the second turn


def read_judge_prompts(path: str = PROMPTS) -> Prompts:
    """Our YAML, or FastChat's judge_prompts.jsonl; which is for what, the placeholders say."""
    if path.endswith((".yaml", ".yml")):
        records = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    else:
        records = [record for _, record in read_records([path], counts=Counter())]
    found = {}
    for record in records:
        if lacking := {"type", "system_prompt", "prompt_template"} - set(record):
            raise ValueError(
                f"a judge prompt in {path} has no {', '.join(sorted(lacking))}: add it"
            )
        template = record["prompt_template"]
        kind = (record["type"], "{ref_answer_1}" in template, "{question_2}" in template)
        found[kind] = JudgePrompt(record["system_prompt"], template)
    return found


def _messages(
    prompts: Prompts, question: Question, turn: int, answers: Mapping[str, Sequence[str]]
) -> list[dict[str, str]]:
    """What a judge is told of a turn, 1 or 2; `answers` by placeholder, "answer_a" or "answer"."""
    kind = "single" if "answer" in answers else "pairwise"
    wanted = (kind, bool(question.reference), turn == 2)
    if wanted not in prompts:
        raise ValueError(
            f"the judge prompts have none of type {kind} with"
            f"{'' if wanted[1] else 'out'} {{ref_answer_1}} and with{'' if wanted[2] else 'out'} "
            "{question_2}: add it to the file, see evals/judge_prompts.yaml"
        )
    texts = {"question": question.turns[turn - 1]}
    named = {"question": question.turns, "ref_answer": question.reference, **answers}
    for name, turns in named.items():
        texts |= {f"{name}_{number}": text for number, text in enumerate(turns, start=1)}
    texts |= {name: turns[turn - 1] for name, turns in answers.items()}
    system, template = prompts[wanted]
    # In one pass, so that what looks like a placeholder in an answer stays as it is.
    names = "|".join(map(re.escape, texts))
    content = re.sub(rf"\{{({names})\}}", lambda found: texts[found[1]], template)
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


# ------------------------------------------------------------------------------------- verdicts


def read_verdict(text: str) -> str | None:
    """A, B or C: the last [[A]], [[B]] or [[C]], as reasons may quote others."""
    found = re.findall(r"\[\[([ABC])\]\]", text)
    return found[-1] if found else None


def read_rating(text: str) -> float | None:
    """The last [[number]], if it is from 1 to 10."""
    found = re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", text)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


# ---------------------------------------------------------------------------------------- pairs


@dataclasses.dataclass(frozen=True)
class PairReport:
    """`games` are for `win_rate.elo`: one per pair with a verdict."""

    model_a: str
    model_b: str
    rows: list[Row]
    games: list[Game]


def judge_pairs(
    judge: Judge,
    answers_a: Answers,
    answers_b: Answers,
    questions: Sequence[Question],
    out: str,
    *,
    prompts: Prompts | None = None,
    on_done: OnDone | None = None,
) -> PairReport:
    """Compare two models' answers, every turn in both seats, judgements in the file `out`.

    `on_done` hears of every judgement, also those that were there.

    Raises:
      ValueError: a model has not answered all questions; the judge does not answer, or gives not
        one verdict.
    """
    prompts = read_judge_prompts() if prompts is None else prompts
    both = {"a": align(answers_a, questions), "b": align(answers_b, questions)}
    models = {"a": answers_a.model, "b": answers_b.model}
    rows, cases = [], []
    for question, turn, order in _games(questions):
        seated = {f"answer_{s}": both[m][question.id] for s, m in zip("ab", order, strict=True)}
        messages = _messages(prompts, question, turn, seated)
        said = {m: both[m][question.id][turn - 1] for m in "ab"}
        cases.append(Case(messages, tuple(said[m] for m in order)))
        row = {"question_id": question.id, "turn": turn, **models, "order": order}
        rows.append(row | {f"len_{m}": len(text) for m, text in said.items()})

    def verdict(row: Judgement, text: str) -> Judgement:
        first, second = row["order"]
        won = {"A": first, "B": second, "C": "tie", None: None}[read_verdict(text)]
        return {"verdict": won, "text": text}

    judged = _ask(judge, rows, cases, out, verdict, on_done)
    _check_any(judge, judged, "verdict")
    pairs = [pair for pair in pairs_of(judged) if pair.preference is not None]
    estimates = {(name, ALL): e for name, e in pair_estimates(judged).items()}
    for group, places in _groups(pairs, questions).items():
        estimates["win_rate", group] = _mean([pairs[i] for i in places], "preference")
    estimates |= {(f"words_{m}", ALL): _mean_words(both[m]) for m in "ab"}
    games = [Game(*models.values(), pair.preference) for pair in pairs]
    rows = _rows(estimates, _hash([judge.name, models["b"], [q.turns for q in questions]]))
    return PairReport(*models.values(), rows, games)


def _games(questions: Sequence[Question]) -> Iterator[tuple[Question, int, str]]:
    for question in questions:
        for turn in _turns(question):
            yield from ((question, turn, order) for order in ("ab", "ba"))


def _turns(question: Question) -> range:
    if len(question.turns) > 2:
        raise ValueError(
            f"question {question.id} has {len(question.turns)} turns, and there are judge prompts "
            "for at most 2: shorten it"
        )
    return range(1, len(question.turns) + 1)


class Pair(NamedTuple):
    """A turn of a question, judged in both seats. `preference` is a's; None without a verdict."""

    question_id: str
    turn: int
    preference: float | None
    flipped: bool  # the verdict changed with the seats
    longer: int  # characters that a's answer has more than b's


def pairs_of(judged: Sequence[Judgement]) -> list[Pair]:
    """Judgements of both seats of a pair, put together."""
    seats: dict[tuple[str, int], list[Judgement]] = {}
    for judgement in judged:
        seats.setdefault((judgement["question_id"], judgement["turn"]), []).append(judgement)
    pairs = []
    for (question_id, turn), both in seats.items():
        verdicts = {j["verdict"] for j in both}
        preference = {"a": 1.0, "b": 0.0}.get(both[0]["verdict"], 0.5)
        preference = None if None in verdicts else preference if len(verdicts) == 1 else 0.5
        longer = both[0]["len_a"] - both[0]["len_b"]
        pairs.append(Pair(question_id, turn, preference, len(verdicts) > 1, longer))
    return pairs


def question_preferences(pairs: Sequence[Pair]) -> dict[str, float]:
    """By question id the mean over its turns, of those with a verdict."""
    turns: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.preference is not None:
            turns.setdefault(pair.question_id, []).append(pair.preference)
    return {question_id: sum(of_it) / len(of_it) for question_id, of_it in turns.items()}


def pair_estimates(judged: Sequence[Judgement]) -> dict[str, Estimate]:
    """What judgements of pairs come to, of the model a. `n` are questions with something to count.

    win_rate          ties count half
    won_share, lost_share   of questions, by the mean over turns; the rest are ties
    ties              share of pairs, those included whose verdict changed with the seats
    lc_win_rate       if both answers had been equally long, see `win_rate.length_controlled`
    longer_wins       share of decided judgements that the longer answer won
    first_seat_share  share of decided judgements that the answer shown first won
    flips             share of pairs whose verdict changed with the seats
    parse_failures    share of judgements without a verdict
    pairs_left_out    share of pairs of which a verdict is missing: the other rows of pairs are
                      about those that are left
    """
    decided = [j for j in judged if j["verdict"] in ("a", "b")]
    unequal = [j for j in decided if j["len_a"] != j["len_b"]]
    pairs = pairs_of(judged)
    whole = [pair for pair in pairs if pair.preference is not None]
    ids = [pair.question_id for pair in whole]  # turns and seats are no independent observations
    preferences = [pair.preference for pair in whole]
    by_question = list(question_preferences(whole).values())
    lengths = [pair.longer for pair in whole]

    def share(of: Sequence[Judgement], is_so: Callable[[Judgement], bool]) -> Estimate:
        return mean([float(is_so(j)) for j in of], [j["question_id"] for j in of])

    return {
        "win_rate": mean(preferences, ids),
        "won_share": mean([float(p > 0.5) for p in by_question]),
        "lost_share": mean([float(p < 0.5) for p in by_question]),
        "ties": mean([float(p == 0.5) for p in preferences], ids),
        "lc_win_rate": length_controlled(preferences, lengths, clusters=ids).win_rate,
        "longer_wins": share(unequal, lambda j: (j["verdict"] == "a") == (j["len_a"] > j["len_b"])),
        "first_seat_share": share(decided, lambda j: j["verdict"] == j["order"][0]),
        "flips": mean([float(pair.flipped) for pair in whole], ids),
        "parse_failures": share(judged, lambda j: j["verdict"] is None),
        "pairs_left_out": mean(
            [float(pair.preference is None) for pair in pairs], [p.question_id for p in pairs]
        ),
    }


# --------------------------------------------------------------------------------------- grades


def grade(
    judge: Judge,
    answers: Answers,
    questions: Sequence[Question],
    out: str,
    *,
    prompts: Prompts | None = None,
    on_done: OnDone | None = None,
) -> list[Row]:
    """The mean of grades from 1 to 10 over turns, as MT-bench's score; by category and turn, too.

    Raises:
      ValueError: as `judge_pairs`.
    """
    if judge in BIASED.values():
        raise ValueError(
            f"{judge.name} judges pairs alone: name an opponent's answers (--against), or a judge"
        )
    prompts = read_judge_prompts() if prompts is None else prompts
    said = align(answers, questions)
    rows, cases = [], []
    for question in questions:
        for turn in _turns(question):
            messages = _messages(prompts, question, turn, {"answer": said[question.id]})
            cases.append(Case(messages, (said[question.id][turn - 1],)))
            rows.append({"question_id": question.id, "turn": turn, "model": answers.model})

    def verdict(row: Judgement, text: str) -> Judgement:
        return {"rating": read_rating(text), "text": text}

    judged = _ask(judge, rows, cases, out, verdict, on_done)
    _check_any(judge, judged, "rating")
    failed = [float(j["rating"] is None) for j in judged]
    grades = [Grade(j["question_id"], j["turn"], j["rating"]) for j in judged if j["rating"]]
    estimates = {("judge_score", ALL): _mean(grades, "rating")}
    for group, places in _groups(grades, questions).items():
        estimates["judge_score", group] = _mean([grades[i] for i in places], "rating")
    estimates["parse_failures", ALL] = mean(failed, [j["question_id"] for j in judged])
    estimates["words", ALL] = _mean_words(said)
    return _rows(estimates, _hash([judge.name, [q.turns for q in questions]]))


class Grade(NamedTuple):
    question_id: str
    turn: int
    rating: float


# ------------------------------------------------------------------------------------------ rows


def _groups(turns: Sequence[Pair | Grade], questions: Sequence[Question]) -> dict[str, list[int]]:
    """Places by category and by turn, where there are several."""
    category = {question.id: question.category for question in questions}
    found: dict[str, list[int]] = {}
    for names in ([category[t.question_id] for t in turns], [f"turn {t.turn}" for t in turns]):
        if len(set(names)) > 1:
            for place, name in enumerate(names):
                found.setdefault(name, []).append(place)
    return found


def _mean(turns: Sequence[Pair | Grade], name: str) -> Estimate:
    return mean([getattr(turn, name) for turn in turns], [turn.question_id for turn in turns])


def _mean_words(answers: Mapping[str, Sequence[str]]) -> Estimate:
    """Per answer."""
    words = [(name, len(text.split())) for name, turns in answers.items() for text in turns]
    return mean([count for _, count in words], [name for name, _ in words])


def _rows(estimates: Mapping[tuple[str, str], Estimate], prompt_hash: str) -> list[Row]:
    """By (metric, group). A share of nothing is nan."""
    return [
        Row(metric, *estimate, group=group, shots=0, normaliser="none", prompt_hash=prompt_hash)
        for (metric, group), estimate in estimates.items()
    ]


# -------------------------------------------------------------------------------------- the file


def file_name(model: str) -> str:
    """A model's name as a part of a file's name: names come from strangers' files of answers."""
    name = re.sub(r"[^\w.-]", "_", model)
    return re.sub(r"^\.*$|^\.", "_", name)[:100]


def _ask(
    judge: Judge,
    rows: Sequence[Judgement],
    cases: Sequence[Case],
    out: str,
    verdict: Callable[[Judgement, str], Judgement],
    on_done: OnDone | None,
) -> list[Judgement]:
    """The judgements of all cases, in order; those that `out` lacks are asked for and appended.

    A judgement is known again by its hash, of the judge and of all it was told.
    """
    rows = [row | {"judge": judge.name} for row in rows]
    rows = [
        row | {"prompt_hash": _hash([row, case.messages])}
        for row, case in zip(rows, cases, strict=True)
    ]
    known = {_key(j): j for j in _read_judgements(out)}
    missing = [i for i, row in enumerate(rows) if _key(row) not in known]
    if on_done and len(missing) < len(rows):
        on_done(len(rows) - len(missing))
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8", errors="replace") as file:
        for place, text in judge.decide([cases[i] for i in missing]):
            row = rows[missing[place]]
            known[_key(row)] = row | verdict(row, text)
            file.write(json.dumps(known[_key(row)], ensure_ascii=False) + "\n")
            file.flush()
            if on_done:
                on_done(1)
    return [known[_key(row)] for row in rows]


def _key(row: Judgement) -> tuple[Any, ...]:
    return (row["question_id"], row["turn"], row.get("order"), row["prompt_hash"])


def _read_judgements(path: str) -> list[Judgement]:
    """The lines of the file, if it is there; what a killed run left of a line is cut off it."""
    place = pathlib.Path(path)
    if not place.exists():
        return []
    content = place.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with place.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}): move it away") from None


def _hash(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _check_any(judge: Judge, judged: Sequence[Judgement], name: str) -> None:
    if all(j[name] is None for j in judged):
        form = "[[A]], [[B]] or [[C]]" if name == "verdict" else "[[1]] to [[10]]"
        said = shorten(judged[0]["text"])
        raise ValueError(
            f"none of the {len(judged)} judgements of {judge.name} holds {form}; the first is "
            f"{said!r}: take a judge that follows instructions"
        )
