"""What a judge has in common with people, of files whose numbers are known by hand."""

import re

import pytest

from easylm_jax.evals.raters import format_agreement, join
from easylm_jax.evals.win_rate import cohens_kappa

M, N = "m", "n"


def votes_of(question_id, *said, models=(M, N)):
    """Seats change from voter to voter."""
    for number, model in enumerate(said):
        left, right = models if number % 2 else models[::-1]
        sides = {left: "left", right: "right"}
        yield {
            "question_id": question_id, "left": left, "right": right, "voter": str(number),
            "vote": sides.get(model, model),
        }  # fmt: skip


def judgements_of(question_id, *turns, longer, judge="j"):
    """`turns`: of each what is said with either seat first, such as "ab"."""
    verdict = {"a": "a", "b": "b", "t": "tie", "?": None}
    for turn, said in enumerate(turns, start=1):
        for order, one in zip(("ab", "ba"), said, strict=True):
            yield {
                "question_id": question_id, "turn": turn, "order": order, "a": M, "b": N,
                "judge": judge, "verdict": verdict[one], "len_a": 100, "len_b": 100 - longer,
            }  # fmt: skip


VOTES = [
    *votes_of("1", M, M, N),
    *votes_of("2", N, N),
    *votes_of("3", M, "tie", "skip"),
    *votes_of("4", "tie", "tie"),
    *votes_of("5", M),
    *votes_of("6", "skip"),
    *votes_of("1", N, N, models=(N, "another")),
    *votes_of("7", N),
    *votes_of("8", M, N),  # no majority
]
JUDGEMENTS = [
    *judgements_of("1", "bb", longer=9),  # another answer's: the one below was made later
    *judgements_of("1", "aa", "ab", longer=9),  # 1 and a tie: m
    *judgements_of("2", "aa", longer=5),
    *judgements_of("3", "aa", "bb", longer=-5),  # a tie
    *judgements_of("4", "tt", longer=5),
    *judgements_of("5", "aa", "?a", longer=-7),  # the turn without a verdict says nothing
    *judgements_of("6", "aa", longer=5),
    *judgements_of("7", "a?", longer=5),
    *judgements_of("8", "aa", longer=5),
    *judgements_of("1", "bb", longer=9, judge="another judge"),
]


def test_votes_and_judgements_of_the_same_answers_are_put_together():
    found = join(VOTES, JUDGEMENTS)
    assert list(found) == ["j", "another judge"]
    assert [tuple(question) for question in found["j"]] == [
        ([M, M, N], M, M),
        ([N, N], M, M),
        ([M, "tie"], "tie", N),
        (["tie", "tie"], "tie", M),
        ([M], M, N),
        ([M, N], M, M),
    ]
    assert [tuple(question) for question in found["another judge"]] == [([M, M, N], N, M)]
    with pytest.raises(ValueError, match="got votes on another and n and judgements of m and n: "):
        join(list(votes_of("1", N, models=(N, "another"))), JUDGEMENTS)


def test_the_numbers_with_ties_and_without():
    found = join(VOTES, JUDGEMENTS)["j"]
    lines = format_agreement("j", found).splitlines()
    assert lines[0] == "j: 12 votes on 6 questions that it judged, too"
    rows = {name: cells for name, *cells in (re.split(r"  +", line) for line in lines[4:])}
    # Majorities: m n tie tie m tie; judge: m m tie tie m m. Decided: m n m against m m m.
    kappa = cohens_kappa([M, N, "tie", "tie", M, "tie"], [M, M, "tie", "tie", M, M])
    assert kappa.value == pytest.approx((4 / 6 - 14 / 36) / (1 - 14 / 36))
    assert rows["Cohen's kappa of these two"] == [
        f"{kappa.value:.3f} ± {kappa.stderr:.2g}", "6", "0.000 ± 0.82", "3"
    ]  # fmt: skip
    assert {name: [cell.split(" %")[0] for cell in cells] for name, cells in rows.items()} == {
        "two voters agree": ["42.9", "5", "40.0", "3"],  # 3 of 7 pairs, 2 of 5
        # 1/3, 1, 0, 1, 0, as a tie of the others counts half; the judge 2/3, 0, 1/2, 1, 1/2.
        "a voter agrees with the majority of the others": ["46.7", "5", "44.4", "3"],
        "the judge agrees with the same majorities": ["53.3", "5", "38.9", "3"],
        "the judge agrees with the majority of all": ["66.7", "6", "66.7", "3"],
        "Cohen's kappa of these two": rows["Cohen's kappa of these two"],
        "the majority chose the longer answer": ["33.3", "3", "33.3", "3"],
        "the judge chose the longer answer": ["75.0", "4", "66.7", "3"],
    }
