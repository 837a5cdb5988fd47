"""Conversation: what every fine-tuning data set is read into, and how it is written as JSON.

What it is not: a rendered text (`text/template.py`) or the reading of any one data set's layout
(`readers.py`). Preference data are conversations too: the answers that were compared share a
`pair`, and each carries the verdict on its last message.

At rest it is one JSON object per line, which `prepare` writes and the reader "messages" reads:

    {"id": "hh.jsonl:7/chosen", "source": "hh", "quality": "good", "pair": "hh.jsonl:7",
     "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from easylm_jax.data.documents import BadLine
from easylm_jax.text.template import ROLES, Message

Quality = Literal["", "good", "bad"]
QUALITIES = ("", "good", "bad")
MESSAGE_KEYS = ("role", "content", "input")  # of what other people write into a message


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer of the assistant, and what is known about that answer."""

    id: str  # file and line (or number in its list), such as "alpaca_data.json:17"
    messages: tuple[Message, ...]
    source: str = ""  # name of the data set
    quality: Quality = ""  # the verdict on the last message; empty: nobody judged it
    pair: str = ""  # answers that were compared with one another share it
    score: float | None = None  # of the last message, as the data set gives it


class Pair(NamedTuple):
    """Two answers to one prompt, of which somebody preferred the first."""

    chosen: Conversation
    rejected: Conversation


def check(conversation: Conversation) -> None:
    """Raise BadLine unless user and assistant take turns, from a user to an answer with text."""
    expected = "user"
    for number, message in enumerate(conversation.messages, start=1):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            _refuse(conversation, "unknown role", f"message {number} has the role {role!r}")
        if (number, role) == (1, "system"):
            continue
        if role != expected:
            reason = f"starts with the {role}" if number == 1 else f"two turns of the {role}"
            _refuse(conversation, reason, f"message {number} is from the {role}")
        if not content.strip():
            _refuse(conversation, f"empty message of the {role}", f"message {number} is empty")
        expected = "assistant" if role == "user" else "user"
    if not conversation.messages or conversation.messages[-1]["role"] != "assistant":
        _refuse(conversation, "no answer at the end", "it does not end with an answer")


def _refuse(conversation: Conversation, reason: str, found: str) -> None:
    raise BadLine(
        reason,
        f"conversation {conversation.id}: {found}; expected user and assistant in turns, after at "
        "most one system message, each with text, the last an answer (on_bad_line='skip' "
        "leaves such out and counts them)",
    )


def message_text(message: Message) -> str:
    """All that was said: the content, and on a line of its own the "input" that belongs to it."""
    given = message.get("input", "")
    return f"{message['content']}\n{given}" if given.strip() else message["content"]


def prompt_key(conversation: Conversation) -> str:
    """Equal for conversations that begin with the same question, but for case and white space.

    Whatever its input: a question about two texts is the same question.
    """
    first = next((m["content"] for m in conversation.messages if m["role"] == "user"), "")
    normal = " ".join(first.casefold().split())
    return hashlib.blake2b(normal.encode(), digest_size=16).hexdigest()


def find_pairs(conversations: Iterable[Conversation]) -> list[Pair]:
    """All (good, bad) pairs of equal `pair`, in the order in which the second of each comes."""
    waiting: dict[str, list[Conversation]] = {}
    pairs = []
    for conversation in conversations:
        if not (conversation.pair and conversation.quality):
            continue
        for other in waiting.setdefault(conversation.pair, []):
            if other.quality != conversation.quality:
                both = sorted((conversation, other), key=lambda c: c.quality != "good")
                pairs.append(Pair(*both))
        waiting[conversation.pair].append(conversation)
    return pairs


def to_json(conversation: Conversation) -> dict[str, Any]:
    """What `from_json` reads; fields that say nothing are left out."""
    fields = {f.name: getattr(conversation, f.name) for f in dataclasses.fields(conversation)}
    fields["messages"] = [dict(message) for message in conversation.messages]
    return {name: value for name, value in fields.items() if value not in ("", None)}


def from_json(fields: Mapping[str, Any], *, where: str, source: str = "") -> Conversation:
    """Also of other people's `{"messages": [...]}`, which have neither id nor source.

    Null is like none: tables, such as Parquet, have nulls where our lines leave a field out.
    """
    messages = fields["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise BadLine(
            "messages of another form",
            f'{where}: "messages" is not a list of {{"role": ..., "content": text}}',
        )
    known = {name: value for name, value in fields.items() if value is not None}
    quality = known.get("quality", "")
    if quality not in QUALITIES:
        raise BadLine(
            "unknown quality", f"{where}: quality is {quality!r}, expected one of {QUALITIES}"
        )
    return Conversation(
        id=str(known.get("id", where)),
        messages=tuple(
            {k: m[k] for k in MESSAGE_KEYS if isinstance(m.get(k), str)} for m in messages
        ),
        source=str(known.get("source", source)),
        quality=quality,
        pair=str(known.get("pair", "")),
        score=known.get("score"),
    )
