"""Templates: how a conversation is written, as data, and the one function that renders them.

Training, sampling, judging and serving all call `render`, so what a model is asked is what it was
trained on: the ids of a prompt (`generate=True`) are the first ids of the training example.

A message is {"role": "system" | "user" | "assistant", "content": text}. Two more keys are known:

- "input" of a user: what the instruction is about, as Alpaca's data have it. A template with a
  place for it (`user_with_input`) puts it there, any other after the content and a line break.
  Blank is none.
- "quality" of an answer that somebody judged: "good" or "bad". Templates with `markers` write the
  marker before that answer, with loss weight 0, so that the model learns to answer as the marker
  says (conditional training: Koala, Chain of Hindsight); other templates refuse it. Several judged
  answers may follow one message of the user: one sequence, in which the last alone is ended.

What it is not: a tokenizer (`example.py` encodes the segments) or the template that a model file
brings along (`jinja_template.py`, which has the same face).
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from etils import epath

from easylm_jax.text.example import Segment

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")
LossOn = Literal["answers", "last", "all"]


@runtime_checkable
class ChatTemplate(Protocol):
    """What `render` renders: a `Template` or a `JinjaTemplate`."""

    name: str
    bos: str  # the text of its BOS segments
    markers: tuple[tuple[str, str], ...]
    user_with_input: str
    stop: tuple[str, ...]

    @property
    def hash(self) -> str:
        """Equal hashes write conversations equally; saved with what was trained."""

    def segments(
        self, messages: Sequence[Message], *, generate: bool, quality: str
    ) -> list[Segment]:
        """What `render` returns, of messages that are in order; "input" only if it has a place."""


def render(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    generate: bool = False,
    quality: str = "",
    loss_on: LossOn = "answers",
) -> list[Segment]:
    """The conversation as segments: weight 1 on answers and the token that ends them, 0 elsewhere.

    `generate` adds all that precedes an answer of that `quality`, and asks that the user has spoken
    last. `loss_on` "last" leaves weight 1 on the last answer alone; "all" puts it on every token
    but BOS. Contents never yield special ids. Raises ValueError where the roles are out of order or
    the template has no marker for a quality.
    """
    _check_order(template, messages, generate=generate, quality=quality)
    placed = [_place_input(template, message) for message in messages]
    segments = template.segments(placed, generate=generate, quality=quality)
    if loss_on == "all":
        return [_weigh(s, float(not (s.special and s.text == template.bos))) for s in segments]
    if loss_on == "last":
        start = _last_answer(segments)
        return [_weigh(s, s.weight * (i >= start)) for i, s in enumerate(segments)]
    return segments


def _check_order(
    template: ChatTemplate, messages: Sequence[Message], *, generate: bool, quality: str
) -> None:
    if not messages:
        raise ValueError("the conversation is empty: give at least one message of the user")
    expected, judged = "user", False
    for number, message in enumerate(messages, start=1):
        role, own_quality = message["role"], message.get("quality", "")
        if role not in ROLES:
            raise ValueError(
                f"message {number} has the role {role!r}: expected one of {', '.join(ROLES)}"
            )
        another = role == "assistant" and judged and own_quality
        if role != expected and (number, role) != (1, "system") and not another:
            raise ValueError(
                f"message {number} is from the {role} where the {expected} was expected: after "
                "an optional system message, user and assistant take turns and the user begins"
            )
        if role == "assistant":
            _check_quality(template, own_quality)
        expected = "assistant" if role == "user" else "user"
        judged = role == "assistant" and bool(own_quality)
    if generate or role == "user":
        _check_quality(template, quality)
    if generate and role != "user" and not (judged and quality):
        raise ValueError(f"an answer needs a message of the user before it, got one of the {role}")


def _check_quality(template: ChatTemplate, quality: str) -> None:
    if quality and not template.markers:
        raise ValueError(
            f"template {template.name!r} has no marker for answers of the quality {quality!r}: "
            f"choose a template that has, such as {_with_markers()}"
        )
    if template.markers and quality not in dict(template.markers):
        raise ValueError(
            f"template {template.name!r} has no marker for the quality {quality!r}: expected one "
            f"of {', '.join(map(repr, dict(template.markers)))}"
        )


def _with_markers() -> str:
    return ", ".join(name for name, template in TEMPLATES.items() if template.markers)


def _place_input(template: ChatTemplate, message: Message) -> dict[str, str]:
    """The message with an "input" only where there is one and the template has a place for it."""
    own = dict(message)
    given = own.pop("input", "")
    if not given.strip():
        return own
    if template.user_with_input:
        return own | {"input": given}
    return own | {"content": f"{own['content']}\n{given}"}


def _weigh(segment: Segment, weight: float) -> Segment:
    return dataclasses.replace(segment, weight=weight)


def _last_answer(segments: Sequence[Segment]) -> int:
    """The index of its first segment. Before it is one without weight, or another answer's end."""
    start = max((i for i, s in enumerate(segments) if s.weight), default=0)
    while start and segments[start - 1].weight and not segments[start - 1].special:
        start -= 1
    return start


def end_token(template: ChatTemplate) -> str | None:
    """The special token, by the name `special_id` takes, that ends an answer; None: there is none.

    The end of a turn need not be the tokenizer's EOS: a sampler has to stop at either. Where there
    is none, `stop` has the texts that come after an answer.
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
    user: str
    answer_opening: str  # after the user and before every answer; `{marker}` is one of `markers`
    assistant: str  # without its special token, and what follows that, if another answer follows
    later_opening: str = ""  # before every user turn but the first
    opening_with_input: str = ""  # in place of `opening` where the first turn has an input
    user_with_input: str = ""  # of a turn that has one: `{user}` and `{input}`
    strip: bool = False  # contents lose the white space around them
    answer_joined: bool = True  # False: SentencePiece puts its space before an answer
    markers: tuple[tuple[str, str], ...] = ()  # (quality, text); "" is of what nobody judged
    stop: tuple[str, ...] = ()  # texts before which an answer is cut off, when sampling

    bos: ClassVar[str] = "bos"

    @property
    def hash(self) -> str:
        """Of the fields that differ from their defaults: it outlives the addition of a field."""
        fields = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        said = {name: value for name, (value, default) in fields.items() if value != default}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def segments(
        self, messages: Sequence[Message], *, generate: bool, quality: str
    ) -> list[Segment]:
        segments: list[Segment] = []
        opening = self.opening
        if "input" in messages[0]:
            opening = self.opening_with_input or opening
        next_roles = [m["role"] for m in messages[1:]] + ["assistant" if generate else ""]
        for message, next_role in zip(messages, next_roles, strict=True):
            role = message["role"]
            texts = {role: message["content"], "input": message.get("input", "")}
            if self.strip:
                texts = {place: text.strip() for place, text in texts.items()}
            if role == "system":
                if not self.opening_with_system:
                    raise ValueError(
                        f"template {self.name!r} has no place for a system message: leave it out, "
                        "or choose another template"
                    )
                self._write(segments, self.opening_with_system, texts, role=role)
                opening = ""
            elif role == "user":
                user = self.user_with_input if "input" in message else self.user
                self._write(segments, opening + user, texts, role=role)
                opening = self.later_opening
            else:
                self._open_answer(segments, message.get("quality", ""))
                pattern = self.assistant.split("⟨")[0] if next_role == role else self.assistant
                self._write(segments, pattern, texts, role=role)
        if generate or role == "user":
            self._open_answer(segments, quality)
        return segments

    def _open_answer(self, segments: list[Segment], quality: str) -> None:
        texts = {"marker": dict(self.markers)[quality]} if self.markers else {}
        self._write(segments, self.answer_opening, texts, role="")

    def _write(
        self, segments: list[Segment], pattern: str, texts: Mapping[str, str], *, role: str
    ) -> None:
        weight = float(role == "assistant")
        for text, special in re.findall("([^⟨]+)|⟨(.+?)⟩", pattern):
            if special:
                segments.append(Segment(special, weight=weight, special=True, role=role))
                weight = 0.0  # what follows the end of an answer is not for the model to write
            else:
                # In one pass, as contents may themselves hold such places.
                text = re.sub(r"\{(\w+)\}", lambda place: texts.get(place[1], place[0]), text)
                joined = role != "assistant" or self.answer_joined
                add_text(segments, text, weight=weight, role=role, joined=joined)


def with_markers(template: Template, markers: Mapping[str, str]) -> Template:
    """The template with other markers for some qualities, also where it stops at one."""
    if not template.markers:
        raise ValueError(
            f"template {template.name!r} has no marker to change: choose one that has, such as "
            f"{_with_markers()}"
        )
    for quality in markers:
        _check_quality(template, quality)
    old = dict(template.markers)
    renamed = {old[quality]: marker for quality, marker in markers.items()}
    return dataclasses.replace(
        template,
        markers=tuple((old | dict(markers)).items()),
        stop=tuple(text for old_text in template.stop if (text := renamed.get(old_text, old_text))),
    )


ALPACA_OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
ALPACA_INPUT_OPENING = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
VICUNA_OPENING = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)

# Where a source has one turn only, further turns repeat its form: that is our own choice.
TEMPLATES = {
    template.name: template
    for template in (
        # Touvron et al. 2023, "Llama 2": the system message stands inside the first user turn.
        Template(
            name="llama2",
            opening="⟨bos⟩[INST] ",
            opening_with_system="⟨bos⟩[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
            user="{user}",
            answer_opening=" [/INST]",
            assistant=" {assistant} ⟨eos⟩",
            later_opening="⟨bos⟩[INST] ",
            strip=True,
        ),
        # Geng et al. 2023, "Koala", and its data pipeline. Answers were tokenised on their own.
        # Without feedback, and in evaluation, the marker is that of good answers. Pairs in one
        # sequence are not Koala's but of "hindsight", its ancestor.
        Template(
            name="koala",
            opening="⟨bos⟩BEGINNING OF CONVERSATION: ",
            opening_with_system="",
            user="USER: {user}",
            answer_opening=" {marker}",
            assistant="{assistant}⟨eos⟩",
            answer_joined=False,
            markers=(("", "GPT:"), ("good", "GPT:"), ("bad", "An Unhelpful Answer:")),
            stop=("An Unhelpful Answer:",),
        ),
        # Liu, Sferrazza and Abbeel 2023, "Chain of Hindsight Aligns Language Models with Feedback".
        # The marker of what nobody judged, EOS and the form of later turns are our own choice.
        Template(
            name="hindsight",
            opening="⟨bos⟩",
            opening_with_system="",
            user="User: {user}",
            answer_opening=" {marker}",
            assistant=" {assistant}⟨eos⟩",
            markers=(
                ("", "Answer:"),
                ("good", "A helpful answer:"),
                ("bad", "An unhelpful answer:"),
            ),
            stop=("A helpful answer:", "An unhelpful answer:"),
        ),
        # FastChat, Vicuna 1.1 and later.
        Template(
            name="vicuna",
            opening=f"⟨bos⟩{VICUNA_OPENING} ",
            opening_with_system="⟨bos⟩{system} ",
            user="USER: {user}",
            answer_opening=" ASSISTANT:",
            assistant=" {assistant}⟨eos⟩",
        ),
        # Taori et al. 2023, "Stanford Alpaca", which has one turn.
        Template(
            name="alpaca",
            opening=f"⟨bos⟩{ALPACA_OPENING}\n\n",
            opening_with_system="⟨bos⟩{system}\n\n",
            user="### Instruction:\n{user}\n\n",
            answer_opening="### Response:",
            assistant="{assistant}⟨eos⟩",
            opening_with_input=f"⟨bos⟩{ALPACA_INPUT_OPENING}\n\n",
            user_with_input="### Instruction:\n{user}\n\n### Input:\n{input}\n\n",
        ),
        # Zhou et al. 2023, "LIMA: Less Is More for Alignment": no roles, and after every utterance
        # a token that it added to the vocabulary. We use one that is there and resize nothing:
        # `Tokenizer.special_id("eot")` says which.
        Template(
            name="lima",
            opening="⟨bos⟩",
            opening_with_system="",
            user="{user}⟨eot⟩",
            answer_opening="",
            assistant="{assistant}⟨eot⟩",
        ),
        # Wang et al. 2023, "How Far Can Camels Go?" (Tülu 1), and Tülu 2.
        Template(
            name="tulu",
            opening="⟨bos⟩",
            opening_with_system="⟨bos⟩<|system|>\n{system}\n",
            user="<|user|>\n{user}\n",
            answer_opening="<|assistant|>\n",
            assistant="{assistant}⟨eos⟩\n",
        ),
        # Dettmers et al. 2023, "QLoRA" (Guanaco), trained with loss_on="all". Nothing ends an
        # answer but the next turn.
        Template(
            name="guanaco",
            opening="⟨bos⟩",
            opening_with_system="",
            user="### Human: {user}",
            answer_opening="### Assistant:",
            assistant=" {assistant}",
            stop=("### Human:", "### Assistant:"),
        ),
        # Xu et al. 2023, "Baize", whose first version trained with loss_on="all". Nothing ends an
        # answer but the next turn. The longer opening that it was served with is a system message.
        Template(
            name="baize",
            opening="⟨bos⟩The conversation between human and AI assistant.\n",
            opening_with_system="⟨bos⟩{system}\n",
            user="[|Human|] {user}\n",
            answer_opening="[|AI|]",
            assistant=" {assistant}",
            later_opening="\n",
            stop=("[|Human|]", "[|AI|]"),
        ),
        # Mukherjee et al. 2023, "Orca": system message, user, answer. The markers were never
        # published: these are our own choice.
        Template(
            name="orca",
            opening="⟨bos⟩",
            opening_with_system="⟨bos⟩### System:\n{system}\n\n",
            user="### User:\n{user}\n\n",
            answer_opening="### Assistant:\n",
            assistant="{assistant}⟨eos⟩",
        ),
        # Xu et al. 2023, "WizardLM", its 7B model, which has one turn; 13B and 30B used Vicuna's.
        Template(
            name="wizardlm",
            opening="⟨bos⟩",
            opening_with_system="",
            user="{user}",
            answer_opening="\n\n### Response:",
            assistant="{assistant}⟨eos⟩",
        ),
        # Anand et al. 2023, "GPT4All", and its training code, which has one turn and no BOS.
        Template(
            name="gpt4all",
            opening="",
            opening_with_system="",
            user="{user}\n",
            answer_opening="",
            assistant="{assistant}⟨eos⟩",
        ),
        # OpenAI's markup. The tokenizer must have its two tokens.
        Template(
            name="chatml",
            opening="",
            opening_with_system="⟨<|im_start|>⟩system\n{system}⟨<|im_end|>⟩\n",
            user="⟨<|im_start|>⟩user\n{user}⟨<|im_end|>⟩\n",
            answer_opening="⟨<|im_start|>⟩assistant\n",
            assistant="{assistant}⟨<|im_end|>⟩\n",
        ),
        # Nothing but the texts: for prompts and completions, and models that never saw a chat.
        Template(
            name="plain",
            opening="⟨bos⟩",
            opening_with_system="⟨bos⟩{system}",
            user="{user}",
            answer_opening="",
            assistant="{assistant}⟨eos⟩",
        ),
    )
}


def find_template(spec: str) -> Template:
    """The template of that name, or in that `.json` file; ValueError names those near it."""
    if spec.endswith(".json"):
        try:
            fields = json.loads(epath.Path(spec).read_text())
            return template_from_json(fields if isinstance(fields, dict) else {})
        except (OSError, ValueError) as error:
            raise ValueError(f"no template can be read from {spec}: {error}") from None
    if spec not in TEMPLATES:
        near = difflib.get_close_matches(spec, TEMPLATES, n=3, cutoff=0.5) or TEMPLATES
        raise ValueError(f"there is no template {spec!r}; near it: {', '.join(near)}")
    return TEMPLATES[spec]


KINDS = {
    str: "a text",
    bool: "true or false",
    dict: 'texts by quality, such as {"": "GPT:", "good": "GPT:", "bad": "An Unhelpful Answer:"}',
    list: 'a list of texts, such as ["### Human:"]',
}


def template_to_json(template: Template) -> dict[str, Any]:
    """All fields, as `template_from_json` and `find_template` read them."""
    fields = dataclasses.asdict(template)
    return fields | {"markers": dict(template.markers), "stop": list(template.stop)}


def template_from_json(fields: Mapping[str, Any]) -> Template:
    """The template; fields that have a default may be missing, as in files of earlier versions.

    Raises ValueError where another is missing, a field is unknown or not what a template has there.
    """
    required = {f.name for f in dataclasses.fields(Template) if f.default is dataclasses.MISSING}
    form = template_to_json(Template(**dict.fromkeys(required, "")))
    if wrong := sorted((required - fields.keys()) | (fields.keys() - form.keys())):
        raise ValueError(
            f"a template has the fields {', '.join(form)}; unknown or missing: {', '.join(wrong)}"
        )
    fields = form | dict(fields)
    for name, value in fields.items():
        right = type(value) is type(form[name])
        if right and isinstance(value, dict | list):
            parts = value.values() if isinstance(value, dict) else value
            right = all(isinstance(part, str) for part in parts)
        if not right:
            raise ValueError(f"{name} is {value!r}: expected {KINDS[type(form[name])]}")
    needed = {
        "user": ["{user}"],
        "assistant": ["{assistant}"],
        "opening_with_system": ["{system}"] * bool(fields["opening_with_system"]),
        "user_with_input": ["{user}", "{input}"] * bool(fields["user_with_input"]),
        "answer_opening": ["{marker}"] * bool(fields["markers"]),
    }
    for name, places in needed.items():
        for place in places:
            if place not in fields[name]:
                raise ValueError(f"{name} is {fields[name]!r}: expected {place} somewhere in it")
    markers, stop = tuple(fields["markers"].items()), tuple(fields["stop"])
    return Template(**fields | {"markers": markers, "stop": stop})
