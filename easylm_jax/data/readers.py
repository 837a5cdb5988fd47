r"""Readers: the layouts that fine-tuning data sets were published in, read into conversations.

What it is not: filtering or splitting (`cleaning.py`, `prepare.py`), or text (`text/template.py`).
`data.chat.reader` names one of READERS, all of which are functions of one record, a JSON object:

    def quiz(record, where):
        '''`{"question": text, "answer": text}`, https://example.org/quiz.'''
        question = text(record, "question", where=where)
        yield exchange(where, question, text(record, "answer", where=where))

    READERS = {..., "quiz": quiz}

That is all a new one needs. `where` ("quiz.jsonl:17") becomes the conversation's id. `text` and
`items` raise BadLine for a missing field or one of another type; what the layout itself says is
of no use, such as a tie, is raised as LeftOut: it is counted, and never an error.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from easylm_jax.data.conversation import Conversation, check, from_json
from easylm_jax.data.documents import (
    BadLine,
    BadLines,
    decode,
    match_files,
    parse_object,
    read_chunks,
    skip_or_raise,
    split_lines,
)
from easylm_jax.text.template import Message

Record = Mapping[str, Any]
Messages = tuple[Message, ...]
Reader = Callable[[Record, str], Iterator[Conversation]]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


class LeftOut(Exception):  # noqa: N818, it is no error
    """A record that is well formed and of no use, with the reason that is counted."""


def read_conversations(
    paths: Sequence[str],
    *,
    reader: str,
    source: str,
    counts: Counter[str],
    on_bad_line: BadLines = "error",
    validate: bool = True,
) -> Iterator[Conversation]:
    """Conversations of the files that the globs `paths` match, named `source` if they name none.

    `counts` gains the reasons for which records were left out, and with `on_bad_line="skip"` also
    those of bad lines; else the first of these is raised. Of two answers that were compared, one
    may be left out alone: `cleaning.drop_lone_verdicts` drops the other. `validate=False` leaves
    `conversation.check` to the caller.
    """
    read = find_reader(reader)
    for where, record in read_records(paths, counts=counts, on_bad_line=on_bad_line):
        try:
            conversations = list(read(record, where))
            if not conversations:
                raise LeftOut("no answer")
        except LeftOut as left_out:
            counts[str(left_out)] += 1
            continue
        except BadLine as bad:
            skip_or_raise(bad, on_bad_line, counts)
            continue
        for conversation in conversations:
            try:
                if validate:
                    check(conversation)
            except BadLine as bad:
                skip_or_raise(bad, on_bad_line, counts)
            else:
                named = conversation.source or source
                yield dataclasses.replace(conversation, source=named)


def find_reader(name: str) -> Reader:
    """The reader of that name; ValueError names those near it."""
    if name not in READERS:
        near = difflib.get_close_matches(name, READERS, n=3, cutoff=0.5) or READERS
        raise ValueError(f"there is no reader {name!r}; near it: {', '.join(near)}")
    return READERS[name]


# ------------------------------------------------------------------------------------ files


def read_records(
    paths: Sequence[str], *, counts: Counter[str], on_bad_line: BadLines = "error"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON objects and rows, each with its place, such as "alpaca_data.json:17".

    That is the line of JSONL, else the number in the array or the table, from 1. Files have folders
    in their names only as far as they differ in them.
    """
    files = match_files(paths)
    shared = len(os.path.commonprefix([file.parts[:-1] for file in files]))
    for file in files:
        name = "/".join(file.parts[shared:])
        try:
            for number, record in _read_file(file, name):
                where = f"{name}:{number}"
                try:
                    if isinstance(record, bytes):
                        record = parse_object(record, where=where)
                    yield where, _checked(record, where)
                except BadLine as bad:
                    skip_or_raise(bad, on_bad_line, counts)
        except BadLine as bad:  # the rest of the file cannot be read
            skip_or_raise(bad, on_bad_line, counts)


def _read_file(file: epath.Path, name: str) -> Iterator[tuple[int, Any]]:
    """Numbered lines of JSONL that are not empty, or items of a JSON array or of Parquet."""
    kind = next((s for s in reversed(file.suffixes) if s not in (".gz", ".zst")), "")
    if kind not in SUFFIXES:
        raise ValueError(
            f"{file} is none of {', '.join(SUFFIXES)} (the first three also .gz or .zst): convert "
            "it, or correct the glob"
        )
    if kind == ".parquet":
        yield from enumerate(_parquet_rows(file), start=1)
        return
    chunks = read_chunks(file)
    first = next(chunks, b"")
    chunks = itertools.chain([first], chunks)
    if kind == ".json" and first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        content = decode(b"".join(chunks), where=name)
        try:
            yield from enumerate(json.loads(content), start=1)
        except (ValueError, RecursionError) as error:
            raise BadLine("not JSON", f"{name} is not a JSON array: {error}") from None
        return
    for number, line in enumerate(split_lines(chunks), start=1):
        if line.strip():
            yield number, line


def _parquet_rows(file: epath.Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file} needs pyarrow: `pip install pyarrow`") from None
    with file.open("rb") as raw:
        try:
            for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise BadLine("damaged file", f"{file} is no whole Parquet file: {reason}") from None


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadLine("not an object", f"{where} is a JSON {type(record).__name__}, not an object")
    with contextlib.suppress(TypeError, RecursionError):  # Parquet has types that JSON has not
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            raise BadLine("not Unicode", f"{where} holds half a surrogate pair") from None
    return record


# --------------------------------------------------------------------- what readers are made of


def text(record: Record, *names: str, where: str, otherwise: str | None = None) -> str:
    """The text of the first of the fields that there is; null is like none."""
    return _field(record, names, str, where, otherwise)


def items(
    record: Record, name: str, of: type, *, where: str, otherwise: list | None = None
) -> list[Any]:
    """As `text`, of a list whose items are all of the type `of`."""
    found = _field(record, (name,), list, where, otherwise)
    for item in found:
        if not isinstance(item, of):
            reason = f"{name!r} holds not {KINDS[of]}"
            is_a = type(item).__name__
            raise BadLine(reason, f"{where}: {name!r} holds a {is_a}, expected {KINDS[of]} each")
    return found


def inner(record: Record, name: str, *, where: str, otherwise: dict | None = None) -> Record:
    """As `text`, of an object inside the record."""
    return _field(record, (name,), dict, where, otherwise)


KINDS = {str: "a text", list: "a list", dict: "an object"}


def _field(record: Record, names: Sequence[str], kind: type, where: str, otherwise: Any) -> Any:
    found = next((name for name in names if record.get(name) is not None), None)
    if found is None:
        if otherwise is not None:
            return otherwise
        wanted = " or ".join(map(repr, names))
        has = ", ".join(map(repr, record)) or "none"
        raise BadLine(f"no field {wanted}", f"{where} has no field {wanted}; its fields are {has}")
    if not isinstance(record[found], kind):
        is_a, reason = type(record[found]).__name__, f"{found!r} is not {KINDS[kind]}"
        raise BadLine(reason, f"{where}: {found!r} is a {is_a}, expected {KINDS[kind]}")
    return record[found]


ROLE_OF = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "bot", "ai", "assistant"), "assistant"),
}


def message(name: str, content: Any, where: str) -> Message:
    """What somebody said, under the name the data set has for them."""
    if name.casefold() not in ROLE_OF:
        known = ", ".join(ROLE_OF)
        raise BadLine("unknown role", f"{where}: {name!r} speaks, expected one of {known}")
    if not isinstance(content, str):
        is_a = type(content).__name__
        raise BadLine("not a text", f"{where}: the {name} says a {is_a}, expected a text")
    return {"role": ROLE_OF[name.casefold()], "content": content}


def exchange(
    where: str, question: str, answer: str, *, system: str = "", given: str = ""
) -> Conversation:
    """One question and its answer; `given` is the text the question is about."""
    user = {"role": "user", "content": question} | ({"input": given} if given.strip() else {})
    turns = (user, {"role": "assistant", "content": answer})
    if system.strip():
        turns = ({"role": "system", "content": system}, *turns)
    return Conversation(where, turns)


def alternating(texts: Sequence[Any], where: str) -> Messages:
    """The user and the assistant in turns."""
    return tuple(message(("user", "assistant")[i % 2], said, where) for i, said in enumerate(texts))


def transcript(whole: str, speaker: str, where: str) -> tuple[str, Messages]:
    """A dialogue in one text: what precedes it, and its turns without the white space around them.

    The pattern `speaker` matches what announces a turn, and its group is who speaks.
    """
    before, *turns = re.split(speaker, whole)
    if not turns:
        raise BadLine("no dialogue", f"{where}: nobody speaks in {whole[:40]!r}")
    said = zip(turns[::2], turns[1::2], strict=True)
    return before.strip(), tuple(message(name, what.strip(), where) for name, what in said)


def compared(
    where: str, good: Messages, bad: Messages, *, scores: Sequence[float | None] = (None, None)
) -> Iterator[Conversation]:
    """Two conversations whose last answers were compared; the same answer twice says nothing."""
    if good[-1] == bad[-1]:
        raise LeftOut("equal answers")
    yield Conversation(f"{where}/chosen", good, quality="good", pair=where, score=scores[0])
    yield Conversation(f"{where}/rejected", bad, quality="bad", pair=where, score=scores[1])


def ranked(scores: Sequence[Any], where: str) -> tuple[int, tuple[float, float]]:
    """Which of two scores is the higher one, and both, that first; a tie is left out."""
    if len(scores) != 2 or not all(isinstance(score, int | float) for score in scores):
        raise BadLine("no two scores", f"{where}: the scores are {scores}, expected two numbers")
    first, second = map(float, scores)
    if not (first > second or second > first):
        raise LeftOut("tie")
    return (0, (first, second)) if first > second else (1, (second, first))


def pick(phrases: Sequence[str], by: str) -> str:
    """One of the phrases, always the same for the same text `by`."""
    digest = hashlib.blake2b(by.encode(), digest_size=8).digest()
    return phrases[int.from_bytes(digest) % len(phrases)]


# ------------------------------------------------------------------- questions and their answers


def alpaca(record: Record, where: str) -> Iterator[Conversation]:
    """`{"instruction", "input", "output"}`, github.com/tatsu-lab/stanford_alpaca.

    Others have "response" in place of "output" (GPTeacher).
    """
    answer = text(record, "output", "response", where=where)
    given = text(record, "input", where=where, otherwise="")
    yield exchange(where, text(record, "instruction", where=where), answer, given=given)


def dolly(record: Record, where: str) -> Iterator[Conversation]:
    """`{"instruction", "context", "response", "category"}`, databricks-dolly-15k.

    Copies in Alpaca's layout are read as well.
    """
    answer = text(record, "response", "output", where=where)
    given = text(record, "context", "input", where=where, otherwise="")
    yield exchange(where, text(record, "instruction", where=where), answer, given=given)


def self_instruct(record: Record, where: str) -> Iterator[Conversation]:
    """`{"instruction", "instances": [{"input", "output"}]}`, github.com/yizhongw/self-instruct."""
    question = text(record, "instruction", where=where)
    for number, instance in enumerate(items(record, "instances", dict, where=where), start=1):
        at = f"{where}/{number}"
        answer = text(instance, "output", where=at)
        yield exchange(at, question, answer, given=text(instance, "input", where=at, otherwise=""))


def prompt_completion(record: Record, where: str) -> Iterator[Conversation]:
    """`{"prompt", "completion" | "response" | "output"}`, without a template around the prompt."""
    answer = text(record, "completion", "response", "output", where=where)
    yield exchange(where, text(record, "prompt", where=where), answer)


def flan_cot(record: Record, where: str) -> Iterator[Conversation]:
    """`{"inputs", "targets"}`, as FLAN's tasks are written, github.com/google-research/FLAN."""
    answer = text(record, "targets", where=where)
    yield exchange(where, text(record, "inputs", where=where), answer)


def gpt4all(record: Record, where: str) -> Iterator[Conversation]:
    """`{"prompt", "response", "source"}`, nomic-ai/gpt4all_prompt_generations."""
    yield exchange(
        where, text(record, "prompt", where=where), text(record, "response", where=where)
    )


def orca(record: Record, where: str) -> Iterator[Conversation]:
    """`{"id", "system_prompt", "question", "response"}`, Open-Orca/OpenOrca."""
    yield exchange(
        where,
        text(record, "question", where=where),
        text(record, "response", where=where),
        system=text(record, "system_prompt", where=where, otherwise=""),
    )


def hc3(
    record: Record, where: str, *, who: Sequence[str] = ("human", "chatgpt")
) -> Iterator[Conversation]:
    """`{"question", "human_answers": [text], "chatgpt_answers": [text]}`, Hello-SimpleAI/HC3.

    One conversation for each answer; "hc3_human" and "hc3_chatgpt" read those of one side.
    """
    question = text(record, "question", where=where)
    for side in who:
        answers = items(record, f"{side}_answers", str, where=where)
        for number, answer in enumerate(answers, start=1):
            yield exchange(f"{where}/{side}/{number}", question, answer)


# -------------------------------------------------------------------------------- conversations


def messages(record: Record, where: str) -> Iterator[Conversation]:
    """`{"messages": [{"role", "content"}]}` and all that `conversation.to_json` writes."""
    items(record, "messages", dict, where=where)
    yield from_json(record, where=where)


def sharegpt(record: Record, where: str) -> Iterator[Conversation]:
    """`{"id", "conversations": [{"from": "human", "value": text}]}`, as FastChat reads ShareGPT."""
    turns = items(record, "conversations", dict, where=where)
    said = ((text(t, "from", where=where), text(t, "value", where=where)) for t in turns)
    yield Conversation(where, tuple(message(who, what, where) for who, what in said))


def lima(record: Record, where: str) -> Iterator[Conversation]:
    """`{"conversations": [text, text]}`, GAIR/lima, the user first.

    LLaMA-Factory's copy: `{"instruction", "input", "output", "history": [[text, text]]}`.
    """
    if "conversations" in record:
        texts = items(record, "conversations", str, where=where)
        yield Conversation(where, alternating(texts, where))
        return
    history = items(record, "history", list, where=where, otherwise=[])
    (last,) = alpaca(record, where)
    before = alternating([said for turn in history for said in turn], where)
    yield Conversation(where, before + last.messages)


def oig(record: Record, where: str) -> Iterator[Conversation]:
    """`{"text": "<human>: ...\\n<bot>: ..."}`, laion/OIG; text before it is a system message."""
    whole = text(record, "text", where=where)
    before, turns = transcript(whole, r"(?:^|\n)<(human|bot)>:", where)
    system = (message("system", before, where),) if before else ()
    yield Conversation(where, system + turns)


def baize(record: Record, where: str) -> Iterator[Conversation]:
    """`{"input": "The conversation ...\\n[|Human|] ...\\n[|AI|] ..."}`, project-baize.

    What precedes the first turn is left to the template; an empty turn at the end is where the
    self-chat would have gone on.
    """
    _, turns = transcript(text(record, "input", where=where), r"(?:^|\n)\[\|(Human|AI)\|\]", where)
    yield Conversation(where, turns if turns[-1]["content"] else turns[:-1])


def oasst(record: Record, where: str, *, best: bool = False) -> Iterator[Conversation]:
    """`{"prompt": {"role": "prompter", "text", "replies": [...]}}`, OpenAssistant/oasst1's trees.

    The root may also be the record itself. One conversation for each way from the root to a last
    answer, which is one that no later answer follows. "oasst_best" takes the reply ranked first at
    every level, as Guanaco's data do (Dettmers et al. 2023, "QLoRA", section 5): one conversation
    for each tree.
    """
    number = 0
    root = inner(record, "prompt", where=where) if "prompt" in record else record
    waiting: list[tuple[Record, Messages]] = [(root, ())]
    while waiting:
        node, before = waiting.pop()
        role, content = (text(node, name, where=where) for name in ("role", "text"))
        turns = (*before, message(role, content, where))
        replies = items(node, "replies", dict, where=where, otherwise=[])
        replies = [reply for reply in replies if not reply.get("deleted")]
        if best:
            replies = sorted(replies, key=_rank)[:1]
        replies = [r for r in replies if r.get("role") == "assistant" or r.get("replies")]
        if turns[-1]["role"] == "assistant" and not replies:
            number += 1
            yield Conversation(f"{where}/{number}", turns)
        waiting += [(reply, turns) for reply in reversed(replies)]


def _rank(reply: Record) -> float:
    """0 is the best; replies that nobody ranked come last."""
    rank = reply.get("rank")
    return float(rank) if isinstance(rank, int | float) else math.inf


# ---------------------------------------------------------------------------------- comparisons


def pairs(record: Record, where: str) -> Iterator[Conversation]:
    """`{"prompt": text or messages, "chosen": text, "rejected": text}`."""
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        before = from_json({"messages": prompt}, where=where).messages
    else:
        before = (message("user", text(record, "prompt", where=where), where),)
    good, bad = (
        (*before, message("assistant", text(record, name, where=where), where))
        for name in ("chosen", "rejected")
    )
    yield from compared(where, good, bad)


def hh(record: Record, where: str) -> Iterator[Conversation]:
    """`{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}`, Anthropic/hh-rlhf.

    Linear95/DSP's copies are `{"text": [first, second], "score": [float, float]}`. Only the last
    answer was judged: where the turns before it differ, which is so in 5 of 2,312, the two do not
    answer one question and are left out as "prompts differ".
    """
    yield from _judged(record, where, speaker="\n\n(Human|Assistant): ")


def _judged(record: Record, where: str, *, speaker: str) -> Iterator[Conversation]:
    """Two transcripts that differ in their last answer."""
    scores: tuple[float | None, float | None] = (None, None)
    if "text" in record:
        both = items(record, "text", str, where=where)
        if len(both) != 2:
            raise BadLine("no two texts", f"{where} has {len(both)} texts, expected two")
        best, scores = ranked(items(record, "score", object, where=where), where)
        texts = [both[best], both[1 - best]]
    else:
        texts = [text(record, name, where=where) for name in ("chosen", "rejected")]
    (before, good), (_, bad) = (transcript(t, speaker, where) for t in texts)
    if before:
        raise BadLine("text before the dialogue", f"{where}: {before[:40]!r} precedes the dialogue")
    if good[:-1] != bad[:-1]:
        raise LeftOut("prompts differ")
    yield from compared(where, good, bad, scores=scores)


SOURCES_PHRASES = (
    "Use these sources:",
    "Answer with the help of these sources:",
    "Here are some passages that may help:",
    "Base your answer on the following:",
)


def webgpt(record: Record, where: str) -> Iterator[Conversation]:
    """`{"question": {"full_text"}, "quotes_0": {"title", "extract"}, "answer_0", "score_0", ...}`.

    openai/webgpt_comparisons: each answer has sources of its own, which follow the question as its
    "input" after a phrase, as in Koala's data. The wording of the phrases is ours. Linear95/DSP's
    copy has transcripts ("## Human:\\n", "## Assistant:\\n") and scores, and no sources.
    """
    if "text" in record:
        yield from _judged(record, where, speaker=r"(?:^|\n\n)## (Human|Assistant):\n")
        return
    question = text(inner(record, "question", where=where), "full_text", where=where)
    best, scores = ranked([record.get("score_0"), record.get("score_1")], where)
    good, bad = (
        exchange(
            where,
            question,
            text(record, f"answer_{side}", where=where),
            given=_quoted(inner(record, f"quotes_{side}", where=where, otherwise={}), where),
        ).messages
        for side in (best, 1 - best)
    )
    yield from compared(where, good, bad, scores=scores)


def _quoted(quotes: Record, where: str) -> str:
    titles, extracts = (
        items(quotes, name, str, where=where, otherwise=[]) for name in ("title", "extract")
    )
    if len(titles) != len(extracts):
        raise BadLine("titles without extracts", f"{where} has quotes of unequal lists")
    lines = [f"[{i}] {t}: {e}" for i, (t, e) in enumerate(zip(titles, extracts, strict=True), 1)]
    return "\n".join([pick(SOURCES_PHRASES, where), *lines]) if lines else ""


def pandalm(record: Record, where: str) -> Iterator[Conversation]:
    """`{"instruction", "input", "response1", "response2", "annotator1": 0 | 1 | 2, ...}`.

    github.com/WeOpenML/PandaLM, the test set: 1 or 2 is the better answer. What two of the three
    annotators say counts; where that is 0 or there are no two, it is a tie.
    """
    votes = Counter(str(record.get(f"annotator{number}")) for number in (1, 2, 3))
    vote, count = votes.most_common(1)[0]
    if set(votes) - {"0", "1", "2"}:
        raise BadLine(
            "unknown vote", f"{where}: the annotators say {list(votes)}, expected 0, 1, 2"
        )
    if vote == "0" or count < 2:
        raise LeftOut("tie")
    good, bad = (
        exchange(
            where,
            text(record, "instruction", where=where),
            text(record, f"response{number}", where=where),
            given=text(record, "input", where=where, otherwise=""),
        ).messages
        for number in (("1", "2") if vote == "1" else ("2", "1"))
    )
    yield from compared(where, good, bad)


SUMMARY_PHRASES = (
    "Summarize the following post.",
    "Write a short summary of this post.",
    "What is this post about, in a few sentences?",
    "Give a brief summary of the text below.",
)


def summarize(record: Record, where: str) -> Iterator[Conversation]:
    """`{"info": {"title", "post"}, "summaries": [{"text"}, {"text"}], "choice": 0 | 1}`.

    openai/summarize_from_feedback, comparisons; news have "article" in place of "post". The wording
    of the task is ours, as is the title before the post. All comparisons of a post get the same
    task, so that it is one prompt.
    """
    info = inner(record, "info", where=where)
    post = text(info, "post", "article", where=where)
    title = text(info, "title", where=where, otherwise="")
    summaries, choice = items(record, "summaries", dict, where=where), record.get("choice")
    if choice not in (0, 1) or len(summaries) != 2:
        raise BadLine("no choice", f"{where}: choice is {choice!r} of {len(summaries)}, not 0 or 1")
    prompt = "\n\n".join(
        [pick(SUMMARY_PHRASES, post), *([f"Title: {title}"] if title else []), post]
    )
    good, bad = (
        exchange(where, prompt, text(summaries[side], "text", where=where).strip()).messages
        for side in (int(choice), 1 - int(choice))
    )
    yield from compared(where, good, bad)


READERS: dict[str, Reader] = {
    "alpaca": alpaca,
    "baize": baize,
    "dolly": dolly,
    "flan_cot": flan_cot,
    "gpt4all": gpt4all,
    "hc3": hc3,
    "hc3_human": functools.partial(hc3, who=("human",)),
    "hc3_chatgpt": functools.partial(hc3, who=("chatgpt",)),
    "hh": hh,
    "lima": lima,
    "messages": messages,
    "oasst": oasst,
    "oasst_best": functools.partial(oasst, best=True),
    "oig": oig,
    "orca": orca,
    "pairs": pairs,
    "pandalm": pandalm,
    "prompt_completion": prompt_completion,
    "self_instruct": self_instruct,
    "sharegpt": sharegpt,
    "summarize": summarize,
    "webgpt": webgpt,
}
