r"""Task: what a model is asked in an evaluation, as data; and the items it makes of documents.

A task is a file of YAML in `tasks/`, or one of the user's own. It holds no code: texts in it are
Jinja (in a sandbox) over the fields of a document.

    name: quiz
    about: "Quiz: what it tests (Authors 2020, arXiv 2001.00000)."
    kind: choice                              # or generate, code, text, chat
    published_at: https://example.org/quiz
    data:                                     # the first whose files are there is read
    - {test: quiz/test.jsonl, shots: quiz/train.jsonl}
    - {tfds: quiz, test: test, shots: train, fields: {answers: "{{ options }}"}}
    prompt: "Question: {{ question }}\nAnswer:"
    choices: "{{ answers }}"                  # alone, {{ }} is a value of any type
    gold: "{{ label | int }}"
    metrics: [acc, acc_norm]
    headline: acc_norm

`base: NAME` takes over what another task says, `base: FILE.yaml` what a file beside it says. Beside
the layouts in which a task was first published, files of the Hugging Face hub are read as
TASK/SPLIT*.parquet. The prompts of the tasks here are those of lm-eval 0.4.13, unless their `about`
says otherwise. Shots are the first of their split; lm-eval does so for MMLU alone, and draws others
for every item by a seed.

What it is not: the asking or the scoring, see `choice.py`, `answers.py`, `code.py`, `rolling.py`
and `chat_answers.py`, one per kind; nor the reading of files, see `task_data.py`.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from easylm_jax.evals import style
from easylm_jax.evals.task_data import Doc, Source, missing, prepare_command, read_source

FOLDER = pathlib.Path(__file__).parent / "tasks"
KINDS = ("choice", "generate", "code", "text", "chat")
# How a metric of `choice` weighs a continuation's log-probability before the best is taken.
NORMALISERS = {
    "acc": "none",
    "acc_norm": "characters",
    "acc_bytes": "UTF-8 bytes",
    "acc_tokens": "tokens",
    "acc_uncond": "unconditional",
    "mc1": "none",
    "mc2": "probability mass",
    "greedy_acc": "none",
    "perplexity": "none",
}
COMPARISONS = ("harness", "harness_nq", "llama", "number")  # normalisers, see answers.py
Template = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Generation:
    """How answers are sampled; see `LanguageModel.generate_until`."""

    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1


@dataclasses.dataclass(frozen=True)
class Task:
    """One file. Templates are filled with a document's fields.

    `prompt` precedes every continuation: the `choices`, or `target` after each of the `contexts`.
    `target` is also what answers the prompt in a shot; without it, that is the choice at `gold`.
    `description` comes first, and `between_shots` follows each shot. `measured` is the text whose
    words and bytes a text's likelihood is divided by, where that is not the prompt. `normaliser`
    names a way in which `answers.py` compares. `code` and `chat` belong to the kinds of that name.
    """

    name: str
    about: str
    kind: str
    data: tuple[Source, ...]
    metrics: tuple[str, ...]
    headline: str
    published_at: str = ""
    prompt: str = ""
    choices: Template = ()
    contexts: Template = ()
    target: str = ""
    gold: Any = None
    turns: Template = ()
    description: str = ""
    between_shots: str = "\n\n"
    delimiter: str = " "
    shots: int = 0
    unconditional: str = "Answer:"
    measured: str = ""
    id: str = ""
    group: str = ""
    categories: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    normaliser: str = ""
    generate: Generation = Generation()
    code: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def normaliser_of(self, metric: str) -> str:
        """What the tables print beside a metric's value."""
        return NORMALISERS[metric] if self.kind == "choice" else self.normaliser or "none"


@dataclasses.dataclass(frozen=True)
class Item:
    """What the model is asked about one document.

    `prompt` is continued (generate, code), its shots in front, or is the text itself (text);
    `pairs` are (context, continuation) to score (choice); `turns` are what a user says (chat).
    """

    id: str
    group: str
    doc: Doc
    prompt: str = ""
    pairs: tuple[tuple[str, str], ...] = ()
    turns: tuple[str, ...] = ()
    gold: Any = None

    @property
    def seed(self) -> int:
        """Of what is drawn for it: its own, so that order, batches and restarts change nothing."""
        asked = json.dumps([self.id, self.prompt, self.turns])
        return int.from_bytes(hashlib.sha256(asked.encode()).digest()[:4])


# ------------------------------------------------------------------------------------ task files


def task_names() -> list[str]:
    """The tasks that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find_task(name: str) -> Task:
    """The task of that name, of a YAML file, or of "text:GLOB", which is any text files."""
    if name.startswith("text:"):
        return _text_task(name.removeprefix("text:"))
    return _task_of(_read_yaml(name), where=name)


def select_metric(task: Task, metric: str) -> Task:
    """The task with this metric as its headline, computed if it was not."""
    metrics = task.metrics if metric in task.metrics else (*task.metrics, metric)
    return _checked(dataclasses.replace(task, metrics=metrics, headline=metric))


def _read_yaml(name: str, *, above: tuple[pathlib.Path, ...] = ()) -> dict[str, Any]:
    """What the file says, over what its base says; `above` are the files it is the base of."""
    file = pathlib.Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not file.exists():
        near = difflib.get_close_matches(name, task_names(), n=3, cutoff=0.4) or task_names()
        raise ValueError(
            f"there is no task {name!r}: expected the path of a .yaml file, text:GLOB, or a task "
            f"such as {', '.join(near)}"
        )
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected the keys of a task")
    if (base := found.pop("base", None)) is None:
        return found
    if file.resolve() in above:
        raise ValueError(f"{file} has itself as its base: name the task of another file")
    if not isinstance(base, str):
        raise ValueError(f"{file} has base = {base!r}, expected the name or the file of a task")
    if base.endswith((".yaml", ".yml")):
        base = str(file.parent / base)
    return _read_yaml(base, above=(*above, file.resolve())) | found


def _task_of(found: Mapping[str, Any], *, where: str) -> Task:
    values = _values(found, where=where)
    needed = ("name", "about", "kind", "data", "metrics", "headline")
    if lacking := [key for key in needed if key not in values]:
        raise ValueError(f"task {where} has no {', '.join(lacking)}: add it to its file")
    return _checked(Task(**values))


def _values(found: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The values of a task file as Task has them."""
    values = dict(found)
    if isinstance(values.get("data"), list):
        values["data"] = [_source(one, f"{where}, data") for one in values["data"]]
    if "generate" in values:
        of_generate = _typed(values["generate"], Generation, f"{where}, generate")
        values["generate"] = Generation(**of_generate)
    if isinstance(values.get("categories"), Mapping):
        values["categories"] = _tuples(values["categories"])
    return _typed(values, Task, where)


def _source(found: Any, where: str) -> Source:
    values = _typed(found, Source, where)
    if "test" not in values:
        raise ValueError(f"task {where}, has {found} without test: name the files of its items")
    return Source(**values)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _typed(values: Any, of: type, where: str) -> dict[str, Any]:
    """The values if they are those of `of`, lists as tuples."""
    hints = typing.get_type_hints(of)
    values = _tuples(_known(values, list(hints), where))
    for key, value in values.items():
        if not _fits(value, hints[key]):
            expected = _IN_WORDS.get(hints[key], "keys and lists of texts")
            raise ValueError(f"task {where} has {key} = {value!r}, expected {expected}")
    return {key: float(v) if hints[key] is float else v for key, v in values.items()}


_IN_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    tuple[str, ...]: "a list of texts",
    Template: "a text or a list of texts",
    tuple[Source, ...]: "a list of keys and values",
    Mapping[str, Any]: "keys and values",
}


def _fits(value: Any, hint: Any) -> bool:
    kind, of = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return True
    if kind is types.UnionType:
        return any(_fits(value, one) for one in of)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(one, of[0]) for one in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_fits(one, of[1]) for one in value.values())
    return isinstance(value, kind)


def _known(values: Any, names: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"task {where} is a {type(values).__name__}, expected keys and values")
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=3, cutoff=0.5) or names
            raise ValueError(f"task {where} has a key {key!r}; near it: {', '.join(near)}")
    return values


def _metrics_of(task: Task) -> list[str]:
    """What can be computed of it."""
    n = task.generate.n
    flexible = ["flexible_match"] if task.normaliser == "number" else []
    return {
        "choice": [*NORMALISERS],
        "generate": ["exact_match", *flexible, *([f"maj@{n}"] if n > 1 else [])],
        "code": [f"pass@{k}" for k in range(1, n + 1)],
        "text": ["bits_per_byte", "byte_perplexity", "word_perplexity"],
        "chat": [*style.ABOUT],
    }[task.kind]


def _checked(task: Task) -> Task:
    if task.kind not in KINDS:
        raise ValueError(f"task {task.name}: kind {task.kind!r} is none of {', '.join(KINDS)}")
    if task.kind == "generate" and task.generate.n > 1:
        votes = f"maj@{task.generate.n}"
        task = dataclasses.replace(task, metrics=tuple(dict.fromkeys((*task.metrics, votes))))
    if task.kind == "generate" and task.normaliser not in COMPARISONS:
        raise ValueError(
            f"task {task.name}: normaliser {task.normaliser!r} is none of {', '.join(COMPARISONS)}"
        )
    if task.kind != "generate" and task.normaliser:
        raise ValueError(f"task {task.name}: a normaliser is for kind generate, not {task.kind}")
    if task.kind == "code" and not isinstance(task.code.get("program"), str):
        raise ValueError(f"task {task.name}: expected `code: {{program: TEXT}}`, got {task.code}")
    known = _metrics_of(task)
    if unknown := [metric for metric in task.metrics if metric not in known]:
        near = f"{', '.join(known[:10])}{', ...' if len(known) > 10 else ''}"
        raise ValueError(f"task {task.name}: metric {unknown[0]!r} is none of {near}")
    if task.headline not in task.metrics:
        raise ValueError(
            f"task {task.name}: the headline {task.headline!r} is none of its metrics, "
            f"{', '.join(task.metrics)}"
        )
    return task


def _text_task(glob: str) -> Task:
    return Task(
        name="text_" + re.sub(r"\W+", "_", glob).strip("_"),
        about=f"Likelihood of the texts {glob}, in bits per byte.",
        kind="text",
        data=(Source(test=glob),),
        metrics=("bits_per_byte", "byte_perplexity", "word_perplexity"),
        headline="bits_per_byte",
        prompt="{{ text }}",
    )


# ----------------------------------------------------------------------------------------- items


def make_items(
    task: Task, data_dir: str, *, shots: int | None = None, limit: int | None = None
) -> list[Item]:
    """The task's items, `shots` (None: as its file says) in front of each, at most `limit`.

    Raises:
      ValueError: the data are not there, lack a field, have too few shots, or one id twice.
    """
    shots = task.shots if shots is None else shots
    shots = 0 if task.kind in ("text", "chat") else shots
    source = _choose_source(task, data_dir, with_shots=shots > 0)
    docs = _documents(task, source, data_dir, shots=False)
    before: dict[str, str] = {}
    if shots:
        shown: dict[str, list[tuple[str, Doc]]] = {}
        for place, doc in _documents(task, source, data_dir, shots=True):
            shown.setdefault(_group(task, doc, place), []).append((place, doc))
        before = {group: _shots(task, of, shots) for group, of in shown.items()}
    items, counts, places = [], itertools.count(), {}
    for place, doc in docs:
        group = _group(task, doc, place)
        if shots and group not in before:
            raise ValueError(f"task {task.name}: no shots are of the group {group!r} of {place}")
        own_id = str(fill(task.id, doc, where=place) if task.id else next(counts))
        if own_id in places:
            raise ValueError(
                f"{place}, has the id {own_id!r} as {places[own_id]} does: make `id` differ"
            )
        places[own_id] = place
        items.append(_item(task, doc, place, own_id, group, before.get(group, "")))
    return limit_items(items, limit)


def limit_items(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first of every group in turn, until there are `limit`, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    seen: dict[str, int] = {}
    ranks = []
    for place, item in enumerate(items):
        seen[item.group] = seen.get(item.group, 0) + 1
        ranks.append((seen[item.group], place))
    return [items[place] for place in sorted(place for _, place in sorted(ranks)[:limit])]


def _choose_source(task: Task, data_dir: str, *, with_shots: bool) -> Source:
    """The first alternative that is there."""
    usable = [source for source in task.data if source.shots] if with_shots else task.data
    if not usable:
        raise ValueError(f"task {task.name} has no data to take shots from: ask for 0 shots")
    lacking = []
    for source in usable:
        lacking.append(missing(source, data_dir, with_shots=with_shots))
        if not lacking[-1]:
            return source
    names = [source.tfds for source in usable if source.tfds]
    prepare = f", or run `{prepare_command(names[0], data_dir)}`" if names else ""
    published = f"it is published at {task.published_at}; " if task.published_at else ""
    raise ValueError(
        f"task {task.name} needs {lacking[0]}, which is not there: {published}put it there{prepare}"
    )


def _documents(task: Task, source: Source, data_dir: str, *, shots: bool) -> list[tuple[str, Doc]]:
    keep = source.keep_shots if shots else source.keep
    docs = []
    for place, doc in read_source(source, data_dir, shots=shots):
        place = f"task {task.name}, {place}"
        for name, value in source.fields.items():
            doc = doc | {name: fill(value, doc, where=place)}
        if not keep or fill(keep, doc, where=place):
            docs.append((place, doc))
    return docs


def _group(task: Task, doc: Doc, place: str) -> str:
    return str(fill(task.group, doc, where=place)) if task.group else ""


def _shots(task: Task, docs: Sequence[tuple[str, Doc]], count: int) -> str:
    """The first `count` documents with their answers."""
    if len(docs) < count:
        raise ValueError(f"task {task.name} has {len(docs)} documents for {count} shots: ask fewer")
    return "".join(_shot(task, doc, place) + task.between_shots for place, doc in docs[:count])


def _shot(task: Task, doc: Doc, place: str) -> str:
    filled = functools.partial(fill, doc=doc, where=place)
    prompt = filled(task.prompt)
    if task.contexts:
        prompt += filled(task.contexts)[filled(task.gold)]
    answer = filled(task.target) if task.target else filled(task.choices)[filled(task.gold)]
    return prompt + task.delimiter + answer


def _item(task: Task, doc: Doc, place: str, own_id: str, group: str, shots: str) -> Item:
    filled = functools.partial(fill, doc=doc, where=place)
    gold = filled(task.gold)
    before = filled(task.description) + shots + filled(task.prompt)
    item = Item(own_id, group, doc, gold=gold)
    if task.kind == "chat":
        return dataclasses.replace(item, turns=tuple(filled(task.turns)))
    if task.kind == "text":
        measured = filled(task.measured) if task.measured else before
        size = {"words": len(re.split(r"\s+", measured)), "bytes": len(measured.encode())}
        return dataclasses.replace(item, prompt=before, gold=size)
    if task.kind != "choice":
        return dataclasses.replace(item, prompt=before)
    if task.contexts:
        answer = task.delimiter + filled(task.target)
        pairs = tuple((before + context, answer) for context in filled(task.contexts))
    else:
        pairs = tuple((before, task.delimiter + choice) for choice in filled(task.choices))
    return dataclasses.replace(item, pairs=pairs)


# ------------------------------------------------------------------------------------- templates


def fill(template: Any, doc: Doc, *, where: str) -> Any:
    """`{{ expression }}` alone gives its value, any other text a text; lists are filled inside.

    What is neither stands for itself.
    """
    if isinstance(template, list | tuple):
        return [fill(part, doc, where=where) for part in template]
    if isinstance(template, Mapping):
        return {key: fill(part, doc, where=where) for key, part in template.items()}
    if not isinstance(template, str):
        return template
    try:
        value = _compiled(template)(doc)
    except (
        jinja2.TemplateError,
        re.error,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: {template[:60]!r} cannot be filled ({reason}); the fields are "
            f"{', '.join(doc)}"
        ) from None
    if isinstance(value, jinja2.Undefined):
        raise ValueError(f"{where}: {template[:60]!r} is nothing; the fields are {', '.join(doc)}")
    return value


@functools.cache
def _compiled(template: str) -> Any:
    alone = re.fullmatch(r"\s*\{\{((?:(?!\{\{|\}\}).)*)\}\}\s*", template, re.DOTALL)
    if alone:
        expression = _JINJA.compile_expression(alone[1].strip(), undefined_to_none=False)
        return lambda doc: expression(**doc)
    return _JINJA.from_string(template).render


def _environment() -> jinja2.Environment:
    """Jinja as lm-eval has it, in a sandbox, with regular expressions."""
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["regex_replace"] = lambda text, old, new: re.sub(old, new, text)
    environment.filters["regex_findall"] = lambda text, pattern: re.findall(pattern, text)
    return environment


_JINJA = _environment()
