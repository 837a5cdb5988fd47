"""What answers look like: length, lists, headings, code, refusals, repetition. Not their worth.

Judges and people are swayed by it (Gudibande et al. 2023, arXiv:2305.15717: imitation models learn
style, not facts), so that these numbers stand beside every preference. Called by `chat_answers.py`.

Every metric is (sum, weight) of one answer; a table shows sums over weights of many. What is inside
fenced code is left out of list_items, headings and exclamations. `refuses` and `as_an_ai` look for
English phrases, a heuristic that is good for comparing models and no count of refusals.
"""

import re

LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE)
FENCED = re.compile(r"^[ \t]*```.*?(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
REFUSAL = re.compile(
    r"\bI(?:['’]m| am) (?:sorry|afraid),? but\b"
    r"|\bI (?:can(?:no|['’])t|am unable to|am not able to|do not have the ability to)\b"
    r"|\bI['’]m (?:unable|not able) to\b",
    re.IGNORECASE,
)
REFUSAL_WITHIN = 200  # characters from the beginning: later it is a caveat
AS_AN_AI = re.compile(
    r"\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b"
    r"|\bI(?:['’]m| am) (?:just )?an? (?:AI|artificial intelligence|(?:large )?language model)\b",
    re.IGNORECASE,
)

# What the tables say of each.
ABOUT = {
    "words": "words per answer",
    "characters": "characters per answer, AlpacaEval's avg_length",
    "list_items": "bullets and numbered items per answer",
    "headings": "Markdown headings per answer",
    "code_blocks": "fenced blocks of code per answer",
    "exclamations": "exclamation marks per answer",
    "refuses": "share of answers that begin with a refusal",
    "as_an_ai": 'share of answers that say "as an AI" or the like',
    "empty": "share of answers without a word",
    "distinct_2": "share of word pairs inside an answer that are not repeated ones",
}


def measure(answer: str) -> dict[str, tuple[float, float]]:
    """Every metric of ABOUT for one answer."""
    words = answer.split()
    pairs = list(zip(words, words[1:], strict=False))
    prose = FENCED.sub("", answer)
    counts = {
        "words": len(words),
        "characters": len(answer),
        "list_items": len(LIST_ITEM.findall(prose)),
        "headings": len(HEADING.findall(prose)),
        "code_blocks": len(FENCED.findall(answer)),
        "exclamations": prose.count("!"),
        "refuses": bool(REFUSAL.search(answer[:REFUSAL_WITHIN])),
        "as_an_ai": bool(AS_AN_AI.search(answer)),
        "empty": not words,
    }
    found = {name: (float(count), 1.0) for name, count in counts.items()}
    return found | {"distinct_2": (float(len(set(pairs))), float(len(pairs)))}
