"""Fine-tuning examples: records of JSON files to ids with loss weights, all at once, in memory.

Two ways lead there: a conversation is read by a reader (`readers.py`) and rendered by a template
(`text/template.py`), or a record is spelled out in EasyLM's language (`text/fields.py`). What it is
not: cleaning (`prepare_chat.py` does that once) or packing. Called by `source.py`, `inspect_data`
and the evaluation on pairs.

Conditional training (Geng et al. 2023, "Koala"; Liu et al. 2023, arXiv:2302.02676, "Chain of
Hindsight") is which of the judged answers are trained on, and which marker stands before each. The
objective does not know of it.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from easylm_jax.data.conversation import Conversation, Pair, find_pairs
from easylm_jax.data.documents import BadLine, BadLines
from easylm_jax.data.readers import read_conversations, read_records
from easylm_jax.text.example import Example, encode_example
from easylm_jax.text.fields import FieldsConfig, fields_example
from easylm_jax.text.template import ChatTemplate, LossOn, Message, render
from easylm_jax.text.tokenizer import Tokenizer

SEQUENCES = ("good", "bad", "good_bad", "bad_good")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How the records of `data.files` become conversations, and conversations loss."""

    template: str  # of text/template.py, a template.json, or "tokenizer": the one beside it
    reader: str = "messages"  # of data/readers.py
    # What judged answers give: sequences with the "good" or the "bad" one alone, or both
    # after one prompt, "good_bad" and "bad_good" (Chain of Hindsight). Others are always used.
    judged: tuple[str, ...] = ("good",)
    conditional: bool = False  # write the template's marker of its quality before a judged answer
    markers: dict[str, str] = dataclasses.field(default_factory=dict)  # instead of the template's
    # Koala marked all answers of a conversation as its last was judged, so that the turns which
    # both share were trained on under both markers.
    mark_shared_turns: bool = False
    loss_on: LossOn = "answers"  # "last" answer only, or "all" tokens
    weighting: Literal["token", "example"] = "token"  # what weighs alike in the loss
    too_long: Literal["drop", "trim"] = "drop"  # trimmed examples keep their beginning, have no end

    def __post_init__(self) -> None:
        if unknown := set(self.judged) - set(SEQUENCES):
            raise ValueError(
                f"data.chat.judged has {', '.join(sorted(unknown))}: expected some of "
                f"{', '.join(SEQUENCES)}"
            )
        if self.mark_shared_turns and not self.conditional:
            raise ValueError(
                "data.chat.mark_shared_turns says which answers get a marker, but none does: set "
                "conditional=True as well"
            )


class Encoded(Sequence):
    """Examples as (ids, weights), and what was left out on the way."""

    def __init__(
        self,
        examples: Iterable[Example],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        counts: Counter[str],
        chat: ChatConfig | None = None,
        on_bad_line: BadLines = "error",
    ):
        self.counts = counts  # of what is left out or trimmed, by reason
        self.meta: list[Mapping[str, Any]] = []  # of each example: id, source, quality
        self._encoded: list[tuple[np.ndarray, np.ndarray]] = []
        for example in examples:
            ids, weights = encode_example(example, tokenizer)
            if wrong := [i for i in ids.tolist() if not 0 <= i < tokenizer.vocab_size]:
                raise ValueError(
                    f"example {example.meta['id']} holds the id {wrong[0]}, but the tokenizer has "
                    f"{tokenizer.vocab_size}: its ids were made with another one"
                )
            total = weights[1:].sum()  # the first token is never a target
            if chat and len(ids) - 1 > seq_len:
                is_kept = chat.too_long == "trim" and weights[1 : seq_len + 1].sum() > 0
                counts["trimmed" if is_kept else "too long"] += 1
                if not is_kept:
                    continue
                ids, weights = ids[: seq_len + 1], weights[: seq_len + 1]
                total = weights[1:].sum()
            if not total > 0:
                if on_bad_line == "error":
                    raise BadLine(
                        "no loss",
                        f"example {example.meta['id']} has no token with a loss weight and would "
                        "be trained on for nothing: mend or remove it, or set "
                        "data.on_bad_line='skip' to leave such out",
                    )
                counts["no loss"] += 1
                continue
            if chat and chat.weighting == "example":
                weights = weights / total
            self.meta.append(example.meta)
            self._encoded.append((ids, weights))

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._encoded[index]

    @property
    def identity(self) -> int:
        """Equal for the same examples in the same order."""
        digest = hashlib.blake2b(digest_size=8)
        for ids, weights in self._encoded:
            digest.update(ids.tobytes() + weights.tobytes())
        return int.from_bytes(digest.digest(), "big")


def chat_examples(
    conversations: Iterable[Conversation],
    cfg: ChatConfig,
    template: ChatTemplate,
    *,
    counts: Counter[str],
    on_bad_line: BadLines = "error",
) -> Iterator[Example]:
    """What conversations give, rendered: first the single answers, then the pairs.

    Raises ValueError where judged answers are asked for and nobody judged any.
    """
    everything = list(conversations)
    asks_for_verdicts = cfg.conditional or any("_" in order for order in cfg.judged)
    if asks_for_verdicts and not any(c.quality for c in everything):
        raise ValueError(
            "data.chat asks for answers marked by quality, but no conversation has a verdict: read "
            "preference data (readers hh, webgpt, pandalm, pairs ...) or set conditional=False and "
            "judged=('good',)"
        )
    makers: list[Callable[[], Example]] = []
    for one in everything:
        if one.quality and one.quality not in cfg.judged:
            counts[f"judged {one.quality}"] += 1
        else:
            makers.append(functools.partial(render_conversation, one, cfg, template))
    orders = [order.split("_") for order in cfg.judged if "_" in order]
    for pair in find_pairs(everything) if orders else ():
        for order in orders:
            makers.append(functools.partial(_render_pair, pair, order, cfg, template))
    yield from _good_ones(makers, counts, on_bad_line)


def _good_ones(
    makers: Iterable[Callable[[], Example]], counts: Counter[str], on_bad_line: BadLines
) -> Iterator[Example]:
    for make in makers:
        try:
            yield make()
        except BadLine as bad:
            if on_bad_line == "error":
                raise
            counts[bad.reason] += 1


def render_conversation(
    conversation: Conversation, cfg: ChatConfig, template: ChatTemplate
) -> Example:
    """The conversation as an example, with the marker of its quality where `cfg` asks for one."""
    messages = list(conversation.messages)
    if cfg.conditional and conversation.quality:
        messages[-1] = _judged_answer(conversation)
        if cfg.mark_shared_turns:
            quality = conversation.quality
            messages = [
                m | {"quality": quality} if m["role"] == "assistant" else m for m in messages
            ]
    return _render(messages, conversation, cfg, template, quality=conversation.quality)


def _render_pair(
    pair: Pair, order: Sequence[str], cfg: ChatConfig, template: ChatTemplate
) -> Example:
    """Both answers after one prompt, each with its marker."""
    prompt = pair.chosen.messages[:-1]
    if prompt != pair.rejected.messages[:-1]:
        raise BadLine(
            "pair with two prompts",
            f"{pair.chosen.id} and {pair.rejected.id} answer different prompts, so they cannot "
            "stand in one sequence: set data.on_bad_line='skip' to leave such pairs out",
        )
    answers = [_judged_answer({"good": pair.chosen, "bad": pair.rejected}[q]) for q in order]
    return _render([*prompt, *answers], pair.chosen, cfg, template, quality="_".join(order))


def _judged_answer(conversation: Conversation) -> Message:
    return {**conversation.messages[-1], "quality": conversation.quality}


def _render(
    messages: Sequence[Message],
    of: Conversation,
    cfg: ChatConfig,
    template: ChatTemplate,
    *,
    quality: str,
) -> Example:
    try:
        segments = render(template, messages, loss_on=cfg.loss_on)
    except ValueError as error:
        raise BadLine("does not fit the template", f"conversation {of.id}: {error}") from None
    return Example(tuple(segments), {"id": of.id, "source": of.source, "quality": quality})


def _from_fields(record: Mapping[str, Any], fields: FieldsConfig, where: str) -> Example:
    try:
        example = fields_example(record, fields, where=where)
    except ValueError as error:
        raise BadLine("does not fit data.fields", str(error)) from None
    return dataclasses.replace(example, meta={"id": where})


def encode_files(
    files: Sequence[str],
    *,
    chat: ChatConfig | None,
    fields: FieldsConfig | None,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    seq_len: int,
    on_bad_line: BadLines,
) -> Encoded:
    """All examples of `files`; an error if there is none."""
    counts: Counter[str] = Counter()
    if chat is not None:
        conversations = read_conversations(
            files, reader=chat.reader, source=chat.reader, counts=counts, on_bad_line=on_bad_line
        )
        examples = chat_examples(
            conversations, chat, template, counts=counts, on_bad_line=on_bad_line
        )
    else:
        records = read_records(files, counts=counts, on_bad_line=on_bad_line)
        makers = (functools.partial(_from_fields, record, fields, at) for at, record in records)
        examples = _good_ones(makers, counts, on_bad_line)
    encoded = Encoded(
        examples, tokenizer, seq_len=seq_len, counts=counts, chat=chat, on_bad_line=on_bad_line
    )
    if not len(encoded):
        raise ValueError(
            f"no example in {', '.join(files)} can be trained on ({dict(counts)}): give other "
            "files, or raise seq_len if they are too long"
        )
    return encoded
