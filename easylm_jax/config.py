"""Between dataclasses, config files and the command line. Called by the entry points and configs.

The schema of every section is a frozen dataclass that lives beside the code that reads it. A config
file builds one from them; `as_config_dict` turns it into a locked ConfigDict so that flags can
override leaves; `from_config_dict` turns that back. Below the entry points there is no ConfigDict.
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_dict

T = TypeVar("T")


def as_config_dict(section: Any) -> ConfigDict:
    """A locked ConfigDict with the fields of a dataclass instance, nested ones included."""
    config = ConfigDict()
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        config[field.name] = _leaf(value, hints[field.name])
    return config.lock()


def _leaf(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_config_dict(value)
    if isinstance(value, Mapping):
        return ConfigDict({k: _leaf(v, None) for k, v in value.items()}).lock()
    kinds = [k for k in typing.get_args(hint) if k in (int, float, str, bool)]
    if value is None and kinds:
        return config_dict.placeholder(kinds[0])
    return value


def from_config_dict(
    cls: type[T], config: Mapping[str, Any] | ConfigDict, where: str = "config"
) -> T:
    """The dataclass `cls` with the values of `config`.

    Raises ValueError naming the key, and the nearest known ones, when `cls` has no such field.
    """
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for key, value in dict(config).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or known
            raise ValueError(f"{where}.{key} is not a known setting; near it: {', '.join(near)}")
        values[key] = _value(hints[key], value, f"{where}.{key}")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}, needed to make a {cls.__name__}")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` states: dataclass, optional, mapping, tuple or plain."""
    if isinstance(value, config_dict.FieldReference):
        value = value.get()
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return from_config_dict(hint, value, where)
    if isinstance(value, Mapping | ConfigDict):
        inner = args[1] if len(args) == 2 else Any
        return {k: _value(inner, v, f"{where}.{k}") for k, v in dict(value).items()}
    origin = typing.get_origin(hint)
    if origin is tuple and not isinstance(value, str):
        return tuple(value)
    if origin is typing.Literal and value not in args:
        raise ValueError(f"{where} = {value!r} is not one of {', '.join(map(repr, args))}")
    if hint is float and isinstance(value, int):
        return float(value)
    expected = origin or hint
    if expected in (int, float, str, bool, tuple) and not isinstance(value, expected):
        raise ValueError(f"{where} = {value!r} is not of type {expected.__name__}")
    return value


def run_main(main: Callable[[list[str]], None]) -> None:
    """absl's `app.run`, with the errors a user can cause shown as one sentence, exit status 2.

    Such are the ValueErrors that a `raise` of our own made, what the operating system refused, and
    what is wrong in the command line. Anything else is a bug and keeps its traceback;
    EASYLM_TRACEBACK=1 keeps them all.
    """

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except (ValueError, OSError) as error:
            if not is_for_user(error):
                raise
            _exit_with(str(error))

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            if not (is_for_user(error) or _is_from_parsing(error)):
                raise  # a bug in a config file
            _exit_with(f"the command line is not understood: {_without_trace(error)}")

    logging.set_verbosity(logging.WARNING)  # `--verbosity=0` shows what the libraries tell
    app.run(guarded, flags_parser=parse)


def at_least(least: int) -> Callable[[str], int]:
    """The argparse type of whole numbers that are not smaller."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {text}")
        return int(text)

    return number


def is_for_user(error: Exception) -> bool:
    """Whether an error is a sentence for the user, not a bug; see `run_main`."""
    if os.environ.get("EASYLM_TRACEBACK"):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    folder = Path(last.filename).parent
    ours = Path(__file__).parent in (folder, *folder.parents) and last.line.startswith("raise ")
    # config_flags raises OSErrors of its own when it cannot load a config file.
    refused = isinstance(error, OSError) and (error.errno or folder.name == "config_flags")
    return ours or bool(refused)


def _without_trace(error: Exception) -> str:
    """The message; ml_collections writes the whole trace of a config file's ValueError into it."""
    lines = str(error).rstrip().splitlines()
    refused = len(lines) > 1 and "parsing config file" in lines[0]
    last = lines[-1] if refused else ""
    return last.removeprefix("ValueError: ") if last.startswith("ValueError: ") else str(error)


def _is_from_parsing(error: Exception) -> bool:
    """Whether only the libraries that read flags had a part in it, and no config file."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    parsers = ("flags", "config_flags", "config_dict")
    return all(f == Path(__file__) or f.parent.name in parsers for f in files)


def _exit_with(text: str) -> None:
    if "Traceback" not in text:  # of a bug in a config file, as config_flags wraps it
        text = " ".join(text.replace("\\n", " ").split())
    if found := re.search(r"Did you mean \W*(\w+)\W* instead of \W*(\w+)", text):
        text = f"--config has no setting {found[2]!r}; near it: {found[1]}"
    elif found := re.fullmatch(r"the command line is not understood: \W*(\w+)\W*", text):
        text = f"--config has no setting {found[1]!r}; the config file shows those it has"
    elif found := re.search(r"Failed loading config file.*?(\[Errno.*?'.*?')", text):
        text = f"the config file cannot be loaded: {found[1]}"
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)
