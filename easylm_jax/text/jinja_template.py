"""JinjaTemplate: the chat template that a model file brings along, as `render` takes templates.

Its source is a stranger's program: it runs in Jinja's sandbox with a bound on its steps. It is
rendered with marks in place of the contents, so that what the template wrote and what people wrote
stay apart: special tokens are recognised in the former alone. The marked rendering, its marks
replaced, must then equal the rendering of the contents themselves.

What it is not: the templates that we train with (`template.py`), which are data.
"""

import functools
import hashlib
import itertools
import json
import re
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from easylm_jax.text.example import Segment
from easylm_jax.text.template import Message, add_text
from easylm_jax.text.tokenizer import Tokenizer

MAX_STEPS = 100_000  # of loops and macros in one rendering
MAX_PRODUCT = 1_000_000
STEPS = "\0steps"  # a variable of the rendering that no template can name
EDGE = "\u2003"  # white space around a mark: where the template strips contents, it is gone


class JinjaTemplate:
    """A template in Jinja's language with the variables and functions that transformers defines.

    The ids are those of transformers, except that contents yield no special ids and that an answer
    is always tokenised on its own, as the model writes it.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, name: str = "the model's own"):
        self.name = name
        self.hash = hashlib.sha256(source.encode()).hexdigest()[:16]
        self._tokenizer = tokenizer
        spelled = {i: piece for piece, i in tokenizer.specials().items()}
        self._tokens = {
            "bos_token": spelled.get(tokenizer.bos_id, ""),
            "eos_token": spelled.get(tokenizer.eos_id, ""),
        }
        try:
            self._compiled = _compile(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self._called} is not understood: {_one_line(error)}") from None

    @property
    def _called(self) -> str:
        return f"the chat template {self.name!r}"

    def segments(self, messages: Sequence[Message], *, generate: bool) -> list[Segment]:
        own, contents = self._apart(messages, generate=generate)
        roles = [messages[number]["role"] for number, _ in contents]
        # What precedes an answer is the prompt, as far as a prompt goes; the rest is answered.
        tail = self._prompt_tail(messages) if "assistant" in roles else ""
        segments: list[Segment] = []
        said = [content for _, content in contents]
        rows = zip(own, ["", *roles], [*roles, ""], [*said, ""], strict=True)
        for text, before, after, content in rows:
            inside = after == "assistant" and text.startswith(tail)
            cut = len(tail) if inside else len(text)
            self._add_own(segments, text[:cut], ends_answer=before == "assistant")
            self._add(segments, text[cut:], "assistant")
            self._add(segments, content, after)
        return segments

    def _add(self, segments: list[Segment], text: str, role: str) -> None:
        after_special = not self._tokenizer.prefix_after_special
        weight = float(role == "assistant")
        add_text(segments, text, weight=weight, role=role, joined_after_special=after_special)

    def _add_own(self, segments: list[Segment], text: str, *, ends_answer: bool) -> None:
        """Text in which special tokens are spelled; the first of them may end an answer."""
        first, *rest = self._tokenizer.split_specials(text)
        ends_answer = ends_answer and bool(rest)
        self._add(segments, first, "assistant" if ends_answer else "")
        for special, plain in zip(rest[::2], rest[1::2], strict=True):
            weight = float(ends_answer)
            segments.append(Segment(special, weight=weight, special=True))
            self._add(segments, plain, "")
            ends_answer = False

    def _apart(
        self, messages: Sequence[Message], *, generate: bool
    ) -> tuple[list[str], list[tuple[int, str]]]:
        """The template's own texts, and between them (message, content as the template put it)."""
        mark = uuid.uuid4().hex
        marked = [m | {"content": f"{EDGE}{mark}{i:06d}{EDGE}"} for i, m in enumerate(messages)]
        text = self._render(marked, generate=generate)
        pieces = re.split(f"({EDGE}?){mark}(\\d{{6}})({EDGE}?)", text)
        own, contents = pieces[::4], []
        for left, number, right in zip(pieces[1::4], pieces[2::4], pieces[3::4], strict=True):
            content = messages[int(number)]["content"]
            content = content if left else content.lstrip()
            contents.append((int(number), content if right else content.rstrip()))
        joined = own[0] + "".join(c + o for (_, c), o in zip(contents, own[1:], strict=True))
        if joined != self._render([dict(m) for m in messages], generate=generate):
            raise ValueError(
                f"{self._called} rewrites what people say, so that it cannot be told from special "
                "tokens: choose a template by name"
            )
        return own, contents

    def _prompt_tail(self, messages: Sequence[Message]) -> str:
        """What follows the content of the user in a prompt."""
        first_user = next(i for i, m in enumerate(messages) if m["role"] == "user")
        own, _ = self._apart(messages[: first_user + 1], generate=True)
        return own[-1]

    def _render(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        variables: dict[str, Any] = {
            "messages": messages,
            "add_generation_prompt": generate,
            "tools": None,
            "documents": None,
            STEPS: itertools.count(),
            **self._tokens,
        }
        try:
            return self._compiled.render(variables)
        except Exception as error:  # a stranger's program may raise anything
            raise ValueError(f"{self._called} fails: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also without products and powers that would take hours or all memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = 1
        for value in (left, right):
            size *= len(value) if isinstance(value, str | list | tuple) else abs(value)
        if size > MAX_PRODUCT or operator == "**":
            raise SecurityError("a product is too large")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks answers in some templates; we know them already."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _compile(source: str) -> jinja2.Template:
    """The template in an environment as transformers makes it, with a count of its steps."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.step = _step
    tree = environment.parse(source)
    for body in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        call = nodes.Call(
            nodes.EnvironmentAttribute("step"), [nodes.ContextReference()], [], None, None
        )
        body.body.insert(0, nodes.ExprStmt(call).set_lineno(body.lineno))
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.globals)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _step(context: jinja2.runtime.Context) -> None:
    if next(context.parent[STEPS]) > MAX_STEPS:
        raise SecurityError(f"it takes more than {MAX_STEPS} steps")
