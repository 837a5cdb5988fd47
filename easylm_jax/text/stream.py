"""TextStream: ids in, text out, as soon as it is certain. Called wherever answers are streamed.

What it is not: a decision when to stop sampling at ids such as EOS; it knows text and stop strings.
"""

import codecs
from collections.abc import Sequence

from easylm_jax.text.tokenizer import Tokenizer


class TextStream:
    """Gives the text of `Tokenizer.decode` piece by piece, up to the first stop string.

    Held back are the bytes of an unfinished character, and the end of the text as long as it may be
    the beginning of a stop string. How ids are dealt out to `push` changes nothing in the whole.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continuation: bool = False
    ):
        """`continuation`: the text goes on after another, so its first space is its own."""
        self._pieces = tokenizer.pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.prefix_space and not continuation
        self._stop = tuple(stop)
        self._held = ""
        self.finished = False  # a stop string has come; there will be no more text

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` make certain."""
        content = b"".join(self._pieces[i] for i in ids)
        if self._strip and content:
            content = content.removeprefix(b" ")
            self._strip = False
        return self._release(self._utf8.decode(content), final=False)

    def close(self) -> str:
        """The text held back; nothing comes after it."""
        return self._release(self._utf8.decode(b"", final=True), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        if self.finished:
            return ""
        text = self._held + text
        ends = [(text.find(s) + len(s), text.find(s)) for s in self._stop if s in text]
        if ends:
            self.finished = True
            return text[: min(ends)[1]]  # of that which is complete first
        held = 0 if final else max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
