"""Templates: how a conversation is written, as data, and the one function that renders them.

Training, sampling, judging and serving all call `render`, so what a model is asked is what it was
trained on: the ids of a prompt (`generate=True`) are the first ids of the training example.

What it is not: a tokenizer (`example.py` encodes the segments) or the template that a model file
brings along (`jinja_template.py`, which has the same face).
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from easylm_jax.text.example import Segment

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
ROLES = ("system", "user", "assistant")


@runtime_checkable
class ChatTemplate(Protocol):
    """What `render` renders: a `Template` or a `JinjaTemplate`."""

    name: str

    @property
    def hash(self) -> str:
        """Equal hashes write conversations equally; saved with what was trained."""

    def segments(self, messages: Sequence[Message], *, generate: bool) -> list[Segment]:
        """What `render` returns, of messages that are in order."""


def render(
    template: ChatTemplate, messages: Sequence[Message], *, generate: bool = False
) -> list[Segment]:
    """The conversation as segments: weight 1 on answers and the token that ends them, 0 elsewhere.

    `generate` adds all that precedes an answer, and asks that the user has spoken last. Contents
    never yield special ids. Raises ValueError where the roles are out of order.
    """
    if not messages:
        raise ValueError("the conversation is empty: give at least one message of the user")
    expected = "user"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in ROLES:
            raise ValueError(
                f"message {number} has the role {role!r}: expected one of {', '.join(ROLES)}"
            )
        if role != expected and (number, role) != (1, "system"):
            raise ValueError(
                f"message {number} is from the {role} where the {expected} was expected: after "
                "an optional system message, user and assistant take turns and the user begins"
            )
        expected = "assistant" if role == "user" else "user"
    if generate and role != "user":
        raise ValueError(f"an answer needs a message of the user before it, got one of the {role}")
    return template.segments(messages, generate=generate)


def end_token(template: ChatTemplate) -> str | None:
    """The special token, by the name `special_id` takes, that ends an answer; None: there is none.

    The end of a turn need not be the tokenizer's EOS: a sampler has to stop at either.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ends = [s.text for s in render(template, turns) if s.special and s.weight]
    return ends[-1] if ends else None


def add_text(
    segments: list[Segment],
    text: str,
    *,
    weight: float,
    role: str,
    joined: bool = True,
    joined_after_special: bool = False,
) -> None:
    """Add text to the end; where no special token and no other weight intervene, to the last one.

    `joined` False: a new segment is tokenised as if it stood alone.
    """
    last = segments[-1] if segments else None
    if not text:
        return
    if last and not last.special and last.weight == weight:
        segments[-1] = dataclasses.replace(last, text=last.text + text, role=role or last.role)
    else:
        goes_on = last is not None and (joined_after_special or not last.special)
        segments.append(Segment(text, weight=weight, role=role, joined=joined and goes_on))


@dataclasses.dataclass(frozen=True)
class Template:
    """Strings around contents: `{system}`, `{user}`, `{assistant}`; special tokens as `⟨eos⟩`.

    A prompt is tokenised in one piece from one special token to the next, an answer on its own, for
    so the model writes it.
    """

    name: str
    opening: str  # before the first turn, where there is no system message
    opening_with_system: str  # where there is one; empty: the template has no place for it
    user: str  # with all that precedes the answer
    assistant: str
    later_opening: str = ""  # before every user turn but the first
    strip: bool = False  # contents lose the white space around them
    answer_joined: bool = True  # False: SentencePiece puts its space before an answer

    @property
    def hash(self) -> str:
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def segments(self, messages: Sequence[Message], *, generate: bool) -> list[Segment]:
        segments: list[Segment] = []
        opening = self.opening
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system" and not self.opening_with_system:
                raise ValueError(
                    f"template {self.name!r} has no place for a system message: leave it out, or "
                    "choose another template"
                )
            if role == "user":
                self._write(segments, opening, "", role)
                opening = self.later_opening
            elif role == "system":
                opening = ""
            pattern = {
                "system": self.opening_with_system,
                "user": self.user,
                "assistant": self.assistant,
            }[role]
            self._write(segments, pattern, content.strip() if self.strip else content, role)
        return segments

    def _write(self, segments: list[Segment], pattern: str, content: str, role: str) -> None:
        weight = float(role == "assistant")
        for text, special in re.findall("([^⟨]+)|⟨(.+?)⟩", pattern):
            if special:
                segments.append(Segment(special, weight=weight, special=True, role=role))
                weight = 0.0  # what follows the end of an answer is not for the model to write
            else:
                text = text.replace(f"{{{role}}}", content)
                joined = role != "assistant" or self.answer_joined
                add_text(segments, text, weight=weight, role=role, joined=joined)


ALPACA_OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
VICUNA_OPENING = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES = {
    template.name: template
    for template in (
        # Touvron et al. 2023, "Llama 2": the system message stands inside the first user turn.
        Template(
            name="llama2",
            opening="⟨bos⟩[INST] ",
            opening_with_system="⟨bos⟩[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
            user="{user} [/INST]",
            assistant=" {assistant} ⟨eos⟩",
            later_opening="⟨bos⟩[INST] ",
            strip=True,
        ),
        # Geng et al. 2023, "Koala". Answers were tokenised on their own.
        Template(
            name="koala",
            opening="⟨bos⟩BEGINNING OF CONVERSATION: ",
            opening_with_system="",
            user="USER: {user} GPT:",
            assistant="{assistant}⟨eos⟩",
            answer_joined=False,
        ),
        # FastChat, Vicuna 1.1 and later.
        Template(
            name="vicuna",
            opening=f"⟨bos⟩{VICUNA_OPENING} ",
            opening_with_system="⟨bos⟩{system} ",
            user="USER: {user} ASSISTANT:",
            assistant=" {assistant}⟨eos⟩",
        ),
        # Taori et al. 2023, "Stanford Alpaca", which has one turn; more repeat the form. An input
        # is part of what the user says, and its opening is given as the system message.
        Template(
            name="alpaca",
            opening=f"⟨bos⟩{ALPACA_OPENING}\n\n",
            opening_with_system="⟨bos⟩{system}\n\n",
            user="### Instruction:\n{user}\n\n### Response:",
            assistant="{assistant}⟨eos⟩",
        ),
        # OpenAI's markup. The tokenizer must have its two tokens.
        Template(
            name="chatml",
            opening="",
            opening_with_system="⟨<|im_start|>⟩system\n{system}⟨<|im_end|>⟩\n",
            user="⟨<|im_start|>⟩user\n{user}⟨<|im_end|>⟩\n⟨<|im_start|>⟩assistant\n",
            assistant="{assistant}⟨<|im_end|>⟩\n",
        ),
        # Nothing but the texts: for prompts and completions, and models that never saw a chat.
        Template(
            name="plain",
            opening="⟨bos⟩",
            opening_with_system="⟨bos⟩{system}",
            user="{user}",
            assistant="{assistant}⟨eos⟩",
        ),
    )
}


def find_template(name: str) -> Template:
    """The template of that name; ValueError names those near it."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=3, cutoff=0.5) or TEMPLATES
        raise ValueError(f"there is no template {name!r}; near it: {', '.join(near)}")
    return TEMPLATES[name]
