"""Whether a judge says what people say: their votes beside its judgements of the same answers.

A person votes on a whole conversation, a judge on every turn of it: its verdict on a question is
what it says of the turns on average. What it is not: the statistics (`win_rate.py`), the votes
(`vote.py`) or the judging (`judgements.py`). Called by `python -m easylm_jax.vote --votes=...`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from easylm_jax.evals.judgements import pairs_of, question_preferences
from easylm_jax.evals.results import Estimate, align, write_stderr, write_value
from easylm_jax.evals.win_rate import agreement, agreement_with_majority, cohens_kappa

TIE = "tie"

Match = tuple[str, frozenset[str]]  # a question and the two models


class Question(NamedTuple):
    """What was said of two answers: a model's name, or a tie. `longer` is the longer one's."""

    votes: list[str]
    judge: str
    longer: str


def join(
    votes: Sequence[Mapping[str, Any]], judgements: Sequence[Mapping[str, Any]]
) -> dict[str, list[Question]]:
    """By judge, the questions that it and people compared the same two models on.

    `votes` are those that count, of which skipped ones say nothing.

    Raises:
      ValueError: there is no such question.
    """
    said: dict[Match, list[str]] = {}
    for vote in votes:
        if vote["vote"] != "skip":
            match = (str(vote["question_id"]), frozenset({vote["left"], vote["right"]}))
            said.setdefault(match, []).append(vote.get(vote["vote"], TIE))
    found = {}
    for judge in dict.fromkeys(j["judge"] for j in judgements):
        judged = _verdicts([j for j in judgements if j["judge"] == judge])
        both = [
            Question(said[match], *of_judge) for match, of_judge in judged.items() if match in said
        ]
        found |= {judge: both} if both else {}
    if not found:
        raise ValueError(
            "expected votes and judgements of the same questions and models, got votes on "
            f"{_models(said)} and judgements of {_models({_match(j) for j in judgements})}: name "
            "files of the same answers"
        )
    return found


def _match(judgement: Mapping[str, Any]) -> Match:
    return str(judgement["question_id"]), frozenset({judgement["a"], judgement["b"]})


def _models(matches: Iterable[Match]) -> str:
    return ", ".join(sorted({" and ".join(sorted(models)) for _, models in matches})) or "nothing"


def _verdicts(judgements: Sequence[Mapping[str, Any]]) -> dict[Match, tuple[str, str]]:
    """Verdict and longer answer of every question. Of several judgements of a seat the last counts,
    as of answers that were made anew."""
    last = {(_match(j), j["turn"], j["order"]): j for j in judgements}
    found = {}
    for models in dict.fromkeys(match[1] for match, _, _ in last):
        of_models = [j for (match, _, _), j in last.items() if match[1] == models]
        a, b = of_models[0]["a"], of_models[0]["b"]
        pairs = pairs_of(of_models)
        longer = Counter()
        for pair in pairs:
            longer[pair.question_id] += pair.longer
        for question_id, preference in question_preferences(pairs).items():
            found[str(question_id), models] = (
                _side(preference - 0.5, a, b),
                _side(longer[question_id], a, b),
            )
    return found


def _side(difference: float | int, a: str, b: str) -> str:
    return a if difference > 0 else b if difference < 0 else TIE


def format_agreement(judge: str, questions: Sequence[Question]) -> str:
    """For the terminal. `n` are questions, those without what a row counts left out."""
    all_votes, decided = _estimates(questions), _estimates(_without_ties(questions), ties=False)
    rows = [["", "all", "n", "without ties", "n"]]
    for what, estimate in all_votes.items():
        cells = [cell for e in (estimate, decided[what]) for cell in (_write(what, e), f"{e.n:,}")]
        rows.append([what, *cells])
    number = sum(len(q.votes) for q in questions)
    head = f"{judge}: {number:,} votes on {len(questions):,} questions that it judged, too"
    return f"{head}\n\n{align(rows)}"


def _without_ties(questions: Sequence[Question]) -> list[Question]:
    decided = [q._replace(votes=[v for v in q.votes if v != TIE]) for q in questions]
    return [q for q in decided if q.votes and q.judge != TIE]


KAPPA = "Cohen's kappa of these two"


def _estimates(questions: Sequence[Question], *, ties: bool = True) -> dict[str, Estimate]:
    several = [q for q in questions if len(q.votes) > 1]
    votes, judge_of = [q.votes for q in several], [q.judge for q in several]
    verdicts = [(_majority(q.votes), q) for q in questions]
    verdicts = [(people, q) for people, q in verdicts if ties or people != TIE]
    people, judge = [said for said, _ in verdicts], [q.judge for _, q in verdicts]
    longer = [q.longer for _, q in verdicts]
    return {
        "two voters agree": agreement(votes),
        "a voter agrees with the majority of the others": agreement_with_majority(votes),
        "the judge agrees with the same majorities": agreement_with_majority(votes, judge_of),
        "the judge agrees with the majority of all": agreement(
            list(zip(people, judge, strict=True))
        ),
        KAPPA: cohens_kappa(people, judge),
        "the majority chose the longer answer": _same_if_decided(people, longer),
        "the judge chose the longer answer": _same_if_decided(judge, longer),
    }


def _majority(votes: Sequence[str]) -> str:
    """The most frequent vote; a tie where several are."""
    (first, count), *others = Counter(votes).most_common()
    return TIE if others and others[0][1] == count else first


def _same_if_decided(said: Sequence[str], longer: Sequence[str]) -> Estimate:
    return agreement(list(zip(said, longer, strict=True)), without=TIE)


def _write(what: str, estimate: Estimate) -> str:
    if not math.isfinite(estimate.value):
        return "-"
    metric = "kappa" if what == KAPPA else "agreement_rate"
    stderr = write_stderr(metric, estimate.stderr)
    return write_value(metric, estimate.value) + (f" ± {stderr}" if stderr else "")
