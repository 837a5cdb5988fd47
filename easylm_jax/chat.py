"""Talk to a model in the terminal: `python -m easylm_jax.chat --model=PATH`

Answers appear as they are written. Each line typed, or piped in, is a message; `--message` asks one
question, prints the answer and ends. Answers go to standard output, all else to standard error.
What it is not: a server, or the Python API (`language_model.py`).
"""

import contextlib
import json
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from easylm_jax.config import run_main
from easylm_jax.language_model import LanguageModel
from easylm_jax.loading import load
from easylm_jax.models.llama import FloatName
from easylm_jax.text.template import find_template, render

HELP = """\
/help          this list
/reset         forget the conversation, keep the system message
/save FILE     write the conversation to FILE, as JSON
/system TEXT   set the system message; without TEXT, remove it
/quality NAME  ask for good or bad answers, where the template has markers; without NAME, neither
/exit          end (so does Ctrl-D)
Ctrl-C stops an answer; what was written of it stays in the conversation."""

BOLD, DIM, PLAIN = "\033[1m", "\033[2m", "\033[0m"


class Chat:
    """A conversation with `lm`, and the commands that change it. Reads and prints nothing."""

    def __init__(
        self,
        lm: LanguageModel,
        *,
        system: str = "",
        quality: str = "",
        seed: int = 0,
        **options: Any,
    ):
        """`options` are those of `LanguageModel.chat`."""
        self.messages: list[dict[str, str]] = []
        self._lm, self._seed, self._options = lm, seed, options
        self._saved: set[Path] = set()
        self.set_system(system)
        self.set_quality(quality)

    def set_system(self, text: str) -> None:
        """Raises ValueError, and changes nothing, if the template has no place for it."""
        system = [{"role": "system", "content": text}] if text else []
        render(self._lm.template, [*system, {"role": "user", "content": "a"}], generate=True)
        self.messages = system + [m for m in self.messages if m["role"] != "system"]

    def set_quality(self, quality: str) -> None:
        """Of the answers to come. Raises ValueError if the template has no marker for it."""
        asked = [{"role": "user", "content": "a"}]
        render(self._lm.template, asked, generate=True, quality=quality)
        self._quality = quality

    def say(self, text: str, on_text: Callable[[str], None]) -> None:
        """Answer `text`, piece by piece to `on_text`.

        An answer that is interrupted counts as far as it went; a message that cannot be answered
        leaves the conversation as it was.
        """
        question = {"role": "user", "content": text}
        # Only the answer to come has its marker, as in training: what was asked of earlier ones
        # stands in `messages` for the record.
        asked = [{"role": m["role"], "content": m["content"]} for m in (*self.messages, question)]
        answer = ""

        def hear(piece: str) -> None:
            nonlocal answer
            answer += piece
            on_text(piece)

        try:
            seed = self._seed + len(asked)  # the same question twice is two answers
            self._lm.chat(asked, on_text=hear, seed=seed, quality=self._quality, **self._options)
        except KeyboardInterrupt:
            if not answer:
                return
        quality = {"quality": self._quality} if self._quality else {}
        self.messages += [question, {"role": "assistant", "content": answer.strip()} | quality]

    def command(self, line: str) -> str:
        """Obey a line that begins with a slash; what to tell about it."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            return HELP
        if name == "/reset":
            self.messages = [m for m in self.messages if m["role"] == "system"]
            return "a new conversation"
        if name == "/system":
            self.set_system(rest)
            return "the system message is set" if rest else "there is no system message now"
        if name == "/quality":
            self.set_quality(rest)
            return f"answers are asked to be {rest}" if rest else "answers are asked to be neither"
        if name == "/save":
            if not rest:
                raise ValueError("/save needs the name of a file")
            return self._save(Path(rest))
        raise ValueError(f"there is no command {name}: /help shows those there are")

    def _save(self, file: Path) -> str:
        if file.exists() and file.absolute() not in self._saved:
            raise ValueError(f"{file} is there already: /save under another name")
        content = {"template": self._lm.template.name, "messages": self.messages}
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        self._saved.add(file.absolute())
        return f"{len(self.messages)} messages written to {file}"


def talk(
    chat: Chat,
    read: Callable[[], str],
    write: Callable[[str], None],
    tell: Callable[[str], None],
) -> None:
    """Lines from `read` until EOFError, answers to `write`, all else to `tell`."""
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            tell("\nCtrl-D or /exit ends")
            continue
        if line == "/exit":
            return
        try:
            if line.startswith("/"):
                tell(chat.command(line))
            elif line:
                chat.say(line, write)
                write("\n")
        except OSError as error:
            tell(f"error: {error}")
        except ValueError as error:
            more = "" if line.startswith("/") else "; /reset begins a new conversation"
            tell(f"error: {error}{more}")


def main(argv: list[str]) -> None:
    """The command line."""
    options = flags.FLAGS
    if len(argv) > 1:
        raise ValueError(f"arguments {argv[1:]} are not understood; write --model=PATH")
    if options.template:
        find_template(options.template)  # before minutes of loading
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    bold, dim, plain = (BOLD, DIM, PLAIN) if at_terminal else ("", "", "")

    def tell(text: str) -> None:
        print(f"{dim}{text}{plain}", file=sys.stderr, flush=True)

    if at_terminal:
        tell(f"loading {options.model} ...")
    lm = load(
        options.model, dtype=options.dtype, template=options.template, tokenizer=options.tokenizer
    )
    if lm.template is None:
        raise ValueError(
            f"{options.model} came without a chat template: name one with --template, such as "
            "--template=plain"
        )
    chat = Chat(
        lm,
        system=options.system,
        quality=options.quality,
        seed=options.seed,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
    )

    def write(text: str) -> None:
        print(text, end="", flush=True)

    if options.message:
        chat.say(options.message, write)
        print()
        return
    # Readline counts what stands between \1 and \2 as having no width.
    prompt = f"\1{bold}\2> \1{plain}\2" if at_terminal else ""
    if at_terminal:
        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401  # `input` can then edit and recall lines
    if at_terminal:
        tell(
            f"template: {lm.template.name}; context: {lm.config.max_seq_len} tokens; /help shows "
            "the commands; before the first answer the model compiles for some seconds"
        )
    talk(chat, lambda: input(prompt), write, tell)
    if at_terminal:
        print()


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The model: a file or folder of any format.")
    flags.DEFINE_string("template", None, "A name or .json file; default: the model's.")
    flags.DEFINE_string("tokenizer", None, "For a model without one: a file, folder or model.")
    flags.DEFINE_string("system", "", "The system message.")
    flags.DEFINE_string("quality", "", "Ask for good or bad answers, if the template has markers.")
    flags.DEFINE_string("message", "", "Ask this, print the answer and end.")
    flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest token every time.")
    flags.DEFINE_float("top_p", 0.9, "Sample from the likeliest tokens with this much probability.")
    flags.DEFINE_integer("top_k", 0, "Sample from this many likeliest tokens; 0: from all.")
    flags.DEFINE_integer("max_new_tokens", 512, "The longest answer.")
    flags.DEFINE_integer("seed", 0, "Of sampling.")
    flags.DEFINE_enum("dtype", "float32", typing.get_args(FloatName), "Of the arithmetic.")
    flags.mark_flag_as_required("model")
    run_main(main)
