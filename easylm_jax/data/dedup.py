"""Duplicates: the same question, exchange or conversation twice, or nearly the same text twice.

Works on groups (`cleaning.py`), so that answers to one prompt which were compared with one another
are never duplicates of each other. The first of several stays. Called by `prepare_chat.py`.
What it is not: a search across data sets, or for the prompts of a test (`decontaminate.py`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal

from easylm_jax.data.cleaning import Group
from easylm_jax.data.conversation import Conversation, message_text

# Koala dropped repeated questions, Vicuna repeated (first question, first answer).
Same = Literal["", "question", "exchange", "conversation"]

SHINGLE_WORDS = 5
NUM_HASHES = 128
SEED = 1
LEAST_SIMILARITY = 0.02  # the least threshold; below, even one hash per band finds too few
BATCH = 1024  # groups hashed at once


def drop_duplicates(
    groups: Iterable[Group], counts: Counter[str], *, same: Same
) -> Iterator[Group]:
    """Drop what agrees with an earlier group, but for case and white space.

    `same` says in what: the first "question", the first "exchange" (question and answer), or the
    whole "conversation" with its verdict. Questions of equal words are common in preference data,
    and so are dialogues that begin alike: there only "conversation" loses nothing.
    """
    seen = set()
    for group in groups:
        key = tuple(sorted({_key(conversation, same) for conversation in group}))
        if key in seen:
            counts[f"same {same}"] += len(group)
        else:
            seen.add(key)
            yield group


def _key(conversation: Conversation, same: Same) -> tuple[str, ...]:
    texts = [" ".join(message_text(m).casefold().split()) for m in conversation.messages]
    if same == "conversation":
        return (conversation.quality, *texts)
    first = next(i for i, m in enumerate(conversation.messages) if m["role"] == "user")
    return tuple(texts[first : first + (1 if same == "question" else 2)])


def drop_near_duplicates(
    groups: Iterable[Group], counts: Counter[str], *, threshold: float
) -> Iterator[Group]:
    """Drop groups whose shingles of words are, to `threshold` or more, those of an earlier one.

    Similarity is that of Jaccard, computed for the candidates that MinHash and locality-sensitive
    hashing give. A search of all pairs found the same ones in OASST, ShareGPT and PandaLM samples.
    """
    try:
        import rensa
    except ImportError:
        raise ValueError(
            "near_duplicates needs rensa, which is not installed: pip install -e .[clean]"
        ) from None
    # Hashes per band: as many as still find nine in ten of those that are as similar as that. The
    # library's own deduplicator finds one in seven, and half of those with a similarity of 0.85.
    rows = max(r for r in (1, 2, 4, 8) if (1 - threshold**r) ** (NUM_HASHES // r) < 0.1)
    index = rensa.RMinHashLSH(threshold, NUM_HASHES, NUM_HASHES // rows)
    kept: list[Group] = []
    remaining = iter(groups)
    while batch := list(islice(remaining, BATCH)):
        shingles = [_shingles(group) for group in batch]
        hashes = rensa.RMinHash.from_token_sets(shingles, NUM_HASHES, SEED)
        for group, own, minhash in zip(batch, shingles, hashes, strict=True):
            candidates = (_shingles(kept[number]) for number in index.query(minhash))
            if any(_similarity(own, other) >= threshold for other in candidates):
                counts[f"near duplicate ({threshold})"] += len(group)
            else:
                index.insert(len(kept), minhash)
                kept.append(group)
                yield group


def _similarity(shingles: list[str], others: list[str]) -> float:
    own, other = set(shingles), set(others)
    return len(own & other) / len(own | other)


def _shingles(group: Group) -> list[str]:
    """Runs of five words of every message once: a pair shares its prompt."""
    messages = dict.fromkeys(message_text(m) for c in group for m in c.messages)
    words = "\n".join(messages).casefold().split()
    runs = zip(*(words[i:] for i in range(SHINGLE_WORDS)), strict=False)
    return list(map(" ".join, runs)) or [" ".join(words)]
