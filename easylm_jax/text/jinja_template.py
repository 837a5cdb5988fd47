"""JinjaTemplate: the chat template that a model file brings along, as `render` takes templates.

Its source is a stranger's program: it runs in Jinja's sandbox with bounds on its steps and on the
text it handles, by which its memory stays under about 1 GB. It is rendered with marks in place of
the contents, so that what the template wrote and what people wrote stay apart: special tokens are
recognised in the former alone. The marked rendering, its marks replaced, must then equal the
rendering of the contents themselves.

What it is not: the templates that we train with (`template.py`), which are data.
"""

import contextvars
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, MappingView, Sequence
from datetime import datetime
from typing import Any

import jinja2
from etils import epath
from jinja2 import ext, nodes, visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from easylm_jax.text.example import Segment
from easylm_jax.text.template import Message, add_text
from easylm_jax.text.tokenizer import Tokenizer

CHAT_TEMPLATE = "chat_template.jinja"  # beside a tokenizer, as transformers has it
MAX_STEPS = 100_000  # of loops and macros in one rendering
MAX_PRODUCT = 1_000_000
MAX_TEXT = 100_000_000  # characters that its operators, filters and methods are given in all
MAX_AT_ONCE = 10_000_000
OBJECT = 50  # what an entry of a list weighs beside its characters
MAX_INDENT = 8
PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "encode")  # of str
GROWING = ("center", "format", "indent", "slice", "batch", "sum", "wordwrap", "urlize", "xmlattr")
EDGE = "\u2003"  # white space around a mark: where the template strips contents, it is gone


def read_chat_template(folder: str) -> str | None:
    """The source that lies in `folder`: a file of its own, or part of `tokenizer_config.json`."""
    own, config = epath.Path(folder) / CHAT_TEMPLATE, epath.Path(folder) / "tokenizer_config.json"
    if own.exists():
        return own.read_text()
    if not config.exists():
        return None
    try:
        found = json.loads(config.read_text()).get("chat_template")
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}") from None
    if isinstance(found, list):  # several, with names
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found


class JinjaTemplate:
    """A template in Jinja's language with the variables and functions that transformers defines.

    The ids are those of transformers, except that contents yield no special ids and that an answer
    is always tokenised on its own, as the model writes it.
    """

    markers: tuple[tuple[str, str], ...] = ()
    user_with_input: str = ""
    stop: tuple[str, ...] = ()

    def __init__(self, source: str, tokenizer: Tokenizer, *, name: str = "the model's own"):
        self.name = name
        self.hash = hashlib.sha256(source.encode()).hexdigest()[:16]
        self._tokenizer = tokenizer
        spelled = {i: piece for piece, i in tokenizer.specials().items()}
        self._tokens = {
            "bos_token": spelled.get(tokenizer.bos_id, ""),
            "eos_token": spelled.get(tokenizer.eos_id, ""),
        }
        self.bos = self._tokens["bos_token"]
        try:
            self._compiled = _compile(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self._called} is not understood: {_one_line(error)}") from None

    @property
    def _called(self) -> str:
        return f"the chat template {self.name!r}"

    def segments(
        self, messages: Sequence[Message], *, generate: bool, quality: str
    ) -> list[Segment]:
        del quality  # without markers there is one
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
            **self._tokens,
        }
        _used.set(_Used())
        try:
            return self._compiled.render(variables)
        except Exception as error:  # a stranger's program may raise anything
            raise ValueError(f"{self._called} fails: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@dataclasses.dataclass
class _Used:
    """By the rendering so far."""

    steps: int = 0
    text: int = 0


_used: contextvars.ContextVar[_Used] = contextvars.ContextVar("used")


def _charge(*values: Any, times: int = 1) -> None:
    """Before text is made of `values`; a SecurityError where it is too much."""
    used, weight = _used.get(), sum(map(_weight, values)) * times
    used.text += weight
    if weight > MAX_AT_ONCE or used.text > MAX_TEXT:
        raise SecurityError("it makes too much text")


def _weight(value: Any) -> int:
    """At least the characters of `str(value)`; a list may hold the same text many times."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, jinja2.utils.Namespace):
        raise SecurityError("a namespace is no text")
    if not isinstance(value, list | tuple | Mapping | MappingView):
        return OBJECT
    total = 0
    parts = itertools.chain(*value.items()) if isinstance(value, Mapping) else value
    for part in parts:
        total += OBJECT + _weight(part)
        if total > MAX_AT_ONCE:
            break
    return total


def _made(result: Any) -> Any:
    """Many small texts take more than the text that they were cut from."""
    if isinstance(result, list | tuple):
        _charge(result)
    return result


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also without what would take hours or all memory."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("the % of texts is not allowed: use ~")
        if operator in ("*", "**"):
            size = 1
            for value in (left, right):
                size *= len(value) if isinstance(value, str | list | tuple) else abs(value)
            if size > MAX_PRODUCT or operator == "**":
                raise SecurityError("a product is too large")
        result = super().call_binop(context, operator, left, right)
        if not isinstance(result, int | float):
            _charge(result)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        pads = attr in PADDING if isinstance(obj, str) else isinstance(obj, int | float | bytes)
        return not pads and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        if super().wrap_str_format(value):
            raise SecurityError("the method format is not allowed: use ~")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if guarded := {"join": _join, "replace": _replace}.get(__obj.__name__):
                return guarded(owner, *args, **kwargs)
            _charge(owner, *args)
            return _made(super().call(__context, __obj, *args, **kwargs))
        return super().call(__context, __obj, *args, **kwargs)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What Jinja makes the output, macros and blocks of; here also `~`."""
        parts = list(parts)
        _charge(*parts)
        return "".join(map(str, parts))

    @staticmethod
    def cut(value: Any, start: int | None, stop: int | None, step: int | None) -> Any:
        """`value[start:stop:step]`"""
        _charge(value)
        return value[start:stop:step]


def _join(separator: str, items: Iterable[Any]) -> str:
    items = list(items)
    _charge(*items)
    _charge(separator, times=len(items))
    return separator.join(items)


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    _charge(text)
    _charge(new, times=text.count(old))
    return text.replace(old, new, count)


def _join_filter(value: Iterable[Any], d: Any = "", attribute: str | None = None) -> str:
    items = list(value)
    for name in attribute.split(".") if attribute else ():
        items = [item[name] for item in items]
    _charge(*items)  # before they become texts
    return _join(str(d), map(str, items))


def _finalize(value: Any) -> Any:
    """Jinja calls it on every value before it is written."""
    _charge(value)
    return value


def _to_json(
    value: Any, *, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False
) -> str:
    _charge(value)
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise SecurityError(f"an indent of {indent} is too large")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _charged(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja with its arguments weighed, or refused as it can make much of little."""

    passed = hasattr(work, "jinja_pass_arg")  # Jinja's own context comes first

    @functools.wraps(work)
    def run(*args: Any, **kwargs: Any) -> Any:
        if name in GROWING:
            raise SecurityError(f"the filter {name} is not allowed")
        _charge(*args[passed:], *kwargs.values())
        return _made(work(*args, **kwargs))

    return run


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks answers in some templates; we know them already."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Watch(visitor.NodeTransformer):
    """`a ~ b` and `a[b:c]` as calls of the sandbox: Jinja has no other way to see to them."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        parts = nodes.List(self.generic_visit(node).nodes)
        return _call("concat", parts).set_lineno(node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node, cut = self.generic_visit(node), node.arg
        if not isinstance(cut, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (cut.start, cut.stop, cut.step)]
        return _call("cut", node.node, *bounds).set_lineno(node.lineno)


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


def _compile(source: str) -> jinja2.Template:
    """The template in an environment as transformers makes it, with a count of its steps."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[ext.loopcontrols, _GenerationTag],
        finalize=_finalize,
        optimized=False,  # nothing of it runs before `render`
    )
    del environment.globals["lipsum"]
    known = environment.filters.items()
    environment.filters = {name: _charged(name, work) for name, work in known}
    safe = {"tojson": _to_json, "join": _join_filter, "replace": lambda s, *a: _replace(str(s), *a)}
    environment.filters.update(safe)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.step = _step
    tree = _Watch().visit(environment.parse(source))
    for body in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        body.body.insert(0, nodes.ExprStmt(_call("step")).set_lineno(body.lineno))
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.globals)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _step() -> None:
    used = _used.get()
    used.steps += 1
    if used.steps > MAX_STEPS:
        raise SecurityError(f"it takes more than {MAX_STEPS} steps")
