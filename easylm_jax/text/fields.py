r"""EasyLM's `fields` language: one JSON object of a data set to an example with loss weights.

What it is not: a chat template (`template.py` renders conversations); it is for data sets written
for EasyLM, whose ids and weights come out as they did there. A string such as
`[question+context],answer,<|eos|>` is split at its commas, and each part is one of

    answer             the text of that field of the object, tokenised on its own
    question+context   texts joined by `subfield_separator`, then tokenised once
    {ids}              ids that are tokenised already: base64 of little-endian integers
    <|bos|>  <|eos|>   that special token
    <|123|>            that id, whatever it stands for
    [part]             any of these with loss weight 0

Beyond EasyLM: white space around names does not matter, and a backslash before any of `,+[{<`
makes it a part of a name.
"""

import base64
import binascii
import dataclasses
import functools
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from easylm_jax.text.example import Example, Segment


@dataclasses.dataclass(frozen=True)
class FieldsConfig:
    """The options of EasyLM's `text_processor`, by its names, and `eos_weight`, which is ours."""

    fields: str = ""
    fields_from_example: str = ""  # the field of each object that holds its own `fields`
    subfield_separator: str = " "
    add_bos_token: bool = True  # weight 0
    add_eos_token: bool = True
    prepend_text: str = ""  # glued to the text of the first part, unless that is ids or a special
    base64_token_dtype: str = "i4"
    eos_weight: Literal["one", "last_field"] = "one"  # of the EOS that add_eos_token adds


@dataclasses.dataclass(frozen=True)
class Part:
    """What stands between two commas."""

    kind: Literal["text", "ids", "special", "id"]
    names: tuple[str, ...]  # fields of the object, or the one special token or id
    weight: float


def fields_example(record: Mapping[str, Any], cfg: FieldsConfig, *, where: str) -> Example:
    """The example that EasyLM's TextProcessor makes of `record`; `where` names it in errors."""
    spec = _text(record, cfg.fields_from_example, where) if cfg.fields_from_example else cfg.fields
    try:
        parts = parse_fields(spec)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    segments = [Segment("bos", weight=0.0, special=True)] if cfg.add_bos_token else []
    for number, part in enumerate(parts):
        prepended = cfg.prepend_text if number == 0 else ""
        segments.append(_segment(part, record, cfg, prepended=prepended, where=where))
    if cfg.add_eos_token:
        if segments[-1].special and segments[-1].text == "eos":
            _warn_of_two_ends()
        weight = 1.0 if cfg.eos_weight == "one" else parts[-1].weight
        segments.append(Segment("eos", weight=weight, special=True))
    return Example(tuple(segments), {"id": where})


@functools.lru_cache(maxsize=4096)  # with fields_from_example there are as many as layouts of data
def parse_fields(spec: str) -> tuple[Part, ...]:
    """The parts of a `fields` string; ValueError where it is not of the language."""
    if not spec.strip():
        raise ValueError("fields is empty: name at least one field, such as '[prompt],answer'")
    return tuple(_parse_part(part.strip()) for part in _split(spec, ","))


def _split(text: str, separator: str) -> list[str]:
    return re.split(rf"(?<!\\){re.escape(separator)}", text)


def _parse_part(text: str) -> Part:
    weight = 1.0
    if text.startswith("[") and text.endswith("]"):
        text, weight = text[1:-1].strip(), 0.0
    inner = text[2:-2].strip()
    if text.startswith("<|") and text.endswith("|>"):
        if inner not in ("bos", "eos") and not re.fullmatch("[0-9]+", inner):
            raise ValueError(
                f"fields has {text!r}, expected <|bos|>, <|eos|> or an id such as <|123|>"
            )
        return Part("special" if inner in ("bos", "eos") else "id", (inner,), weight)
    if text.startswith("{") and text.endswith("}"):
        return Part("ids", (_unescape(text[1:-1]),), weight)
    return Part("text", tuple(map(_unescape, _split(text, "+"))), weight)


def _unescape(name: str) -> str:
    return re.sub(r"\\([,+\[{<])", r"\1", name.strip())


def _segment(
    part: Part, record: Mapping[str, Any], cfg: FieldsConfig, *, prepended: str, where: str
) -> Segment:
    if part.kind == "special":
        return Segment(part.names[0], weight=part.weight, special=True)
    if part.kind == "id":
        return Segment(ids=(int(part.names[0]),), weight=part.weight)
    texts = [_text(record, name, where) for name in part.names]
    if part.kind == "ids":
        ids = _decode_ids(texts[0], cfg.base64_token_dtype, f"{where}, field {part.names[0]!r}")
        return Segment(ids=ids, weight=part.weight)
    return Segment(prepended + cfg.subfield_separator.join(texts), weight=part.weight)


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    if name not in record:
        hint = ""
        if name.startswith("[") or name.endswith("]"):
            hint = "; a pair of brackets holds what stands between two commas, so write [a],[b]"
        raise ValueError(
            f"{where} has no field {name!r}, only {', '.join(map(repr, record))}{hint}"
        )
    if not isinstance(record[name], str):
        kind = type(record[name]).__name__
        raise ValueError(f"{where}: field {name!r} is a {kind}, expected a text")
    return record[name]


def _decode_ids(text: str, dtype: str, where: str) -> tuple[int, ...]:
    little_endian = np.dtype(dtype).newbyteorder("<")
    try:
        return tuple(np.frombuffer(base64.b64decode(text), little_endian).tolist())
    except (binascii.Error, ValueError):
        raise ValueError(
            f"{where} is not base64 of whole {dtype} integers: set base64_token_dtype to the type "
            "that the ids were written with"
        ) from None


@functools.cache
def _warn_of_two_ends() -> None:
    warnings.warn(
        "fields ends in <|eos|> and add_eos_token adds another, so the model learns to say EOS "
        "twice: set add_eos_token to False",
        stacklevel=2,
    )
