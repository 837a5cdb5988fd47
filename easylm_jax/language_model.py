"""A model with its tokenizer: text in, text and log-probabilities out. The Python API.

    lm = easylm_jax.load("path/to/a/model")
    lm.generate(["Once upon a time"], max_new_tokens=64, temperature=0.7, top_p=0.9)[0].text
    lm.loglikelihood([("The capital of France is", " Paris")])
    lm.chat([{"role": "user", "content": "Hello"}])

`loading.py` makes one from a path, an evaluator from the parameters in training. Everything that
asks many questions (evaluation, lm-eval, a server) asks them here, all at once. What it is not: the
work on ids (`sampler.py` continues prompts, `scoring.py` rates them) or a server.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from easylm_jax.array_types import Params, Tokens
from easylm_jax.models.llama import LlamaConfig, output_kernel, output_logits
from easylm_jax.objectives import token_losses
from easylm_jax.sampler import (
    Generated,
    SamplingConfig,
    generate,
    inference_model,
    num_row_shards,
    pad_prompts,
    read_prefix,
)
from easylm_jax.scoring import Scored, score
from easylm_jax.sharding import constrain
from easylm_jax.text.example import encode_segment
from easylm_jax.text.stream import TextStream
from easylm_jax.text.template import ChatTemplate, Message, end_token, render
from easylm_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model said after a prompt. `ids` include the end token if it came to one.

    `log_probs` has one value per id, of the model itself (temperature 1, nothing left out).
    """

    text: str
    ids: list[int]
    log_probs: list[float]
    finish_reason: Literal["stop", "length"]

    def __str__(self) -> str:
        return self.text


MIN_PREFIX_WORK = 512  # tokens; reading a prefix apart compiles a program of its own


class Likelihood(NamedTuple):
    """Summed log-probability of a continuation's ids, and whether each was the best guess."""

    log_prob: float
    is_greedy: bool
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue, with settings of its own. `until` has the strings that end the text."""

    prompt: str | tuple[int, ...]
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1  # completions
    seed: int = 0

    def __post_init__(self) -> None:
        _check_counts(max_new_tokens=self.max_new_tokens, n=self.n)


OnText = Callable[[int, str], None]  # row, the text that is new
OnDone = Callable[[int], None]  # how many requests were finished since the last call


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """See the top of this file.

    `mesh` is the one `params` lies on; None: one device. `stop_ids` end an answer beside the
    tokenizer's EOS, as the model's files say.
    """

    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    mesh: Mesh | None = None
    stop_ids: tuple[int, ...] = ()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        n: int = 1,
        seed: int | Sequence[int] = 0,
        batch_size: int = 8,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """`n` completions of every prompt, those of one prompt next to one another.

        A prompt is a text, which gets a BOS if the model expects one, or ids as they are. A
        completion ends at the model's end tokens, at `stop_ids`, before any of the strings in
        `stop` (the spelling of a special token means the token), or when `max_new_tokens` or the
        model's context is used up. `seed` is one number, or one per completion: a completion
        depends on its prompt and its own seed, not on how many (`batch_size`) are made at once.
        `on_text` hears of every piece of text as soon as it is certain. `SamplingConfig` explains
        the rest.

        Raises:
          ValueError: a prompt that is empty, leaves no room in the context or has ids that the
            model does not know; a value out of range.
        """
        _check_counts(max_new_tokens=max_new_tokens, n=n, batch_size=batch_size)
        rows = [self._prompt_ids(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        made = self._complete(
            rows,
            sampling=SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty),
            seeds=_seeds(seed, len(rows) * n),
            limits=[max_new_tokens] * len(rows),
            stop=stop,
            stop_ids=stop_ids,
            n=n,
            batch_size=batch_size,
            on_text=on_text,
        )
        return [completion for group in made for completion in group]

    def generate_until(
        self,
        requests: Sequence[GenerationRequest],
        *,
        truncate: bool = False,
        batch_size: int = 16,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """The completions of every request, `n` of them, by the rules of `generate`.

        A completion depends on its own request alone. Requests that differ in their prompts,
        seeds and `max_new_tokens` only are answered together, those of similar length first, in
        batches of `batch_size` completions; what all their prompts begin with is read once. With
        `truncate` a prompt keeps as many of its last ids as leave room for `max_new_tokens`
        (lm-eval's rule; this cuts a BOS off).

        Raises:
          ValueError: as `generate`.
        """
        alike: dict[tuple, list[int]] = {}
        for i, r in enumerate(requests):
            alike.setdefault((r.until, r.temperature, r.top_p, r.n), []).append(i)
        found: dict[int, list[Completion]] = {}
        for (until, temperature, top_p, n), places in alike.items():
            own = [requests[i] for i in places]
            made = self._complete(
                [self._prompt_ids(r.prompt, r.max_new_tokens if truncate else 0) for r in own],
                sampling=SamplingConfig(temperature=temperature, top_p=top_p),
                seeds=[seed for r in own for seed in _seeds(r.seed, n)],
                limits=[r.max_new_tokens for r in own],
                stop=until,
                n=n,
                batch_size=batch_size,
                on_done=on_done,
            )
            found |= zip(places, made, strict=True)
        return [found[i] for i in range(len(requests))]

    def _complete(
        self,
        rows: Sequence[list[int]],
        *,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        limits: Sequence[int],
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        n: int = 1,
        batch_size: int,
        on_text: OnText | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """`n` completions of every row; completion j of row i has seed i * n + j.

        `batch_size` rows are made at once, or one for every device that the mesh splits rows over.
        """
        specials = self._tokenizer.specials()
        named = {specials[s] for s in stop if s in specials}
        ends = sorted({self._tokenizer.eos_id, *self.stop_ids, *stop_ids, *named})
        stop = [s for s in stop if s not in specials]
        common, prefix = _common_prefix(rows), None
        with self._on_mesh():
            prompts = max(batch_size // n, num_row_shards())
            if common:
                prefix = read_prefix(self.params, rows[0][:common], config=self.config)
        samples = min(n, max(batch_size // prompts, 1))  # of a prompt at once
        done: list[list[Completion]] = [[] for _ in rows]
        for batch, first in itertools.product(
            _batches(list(map(len, rows)), prompts), range(0, n, samples)
        ):
            most = [min(limits[i], self.config.max_seq_len - len(rows[i])) for i in batch]
            last = min(first + samples, n)
            places = [i * n + j for i in batch for j in range(first, last)]
            writers = [_Writer(self._tokenizer, stop, ends, place, on_text) for place in places]
            with self._on_mesh():
                made = generate(
                    self.params,
                    [rows[i][common:] for i in batch],
                    config=self.config,
                    sampling=sampling,
                    seeds=[seeds[place] for place in places],
                    max_new_tokens=[limit for limit in most for _ in range(first, last)],
                    vocab_size=self._tokenizer.vocab_size,
                    stop_ids=ends,
                    samples=last - first,
                    prefix=prefix,
                    callback=functools.partial(_show, writers) if stop or on_text else None,
                )
            _show(writers, made, last=True)
            for place, writer, log_probs in zip(places, writers, made.log_probs, strict=True):
                done[place // n].append(writer.completion(log_probs))
            if on_done and last == n:
                on_done(len(batch))
        return done

    def chat(
        self,
        messages: Sequence[Message],
        *,
        on_text: Callable[[str], None] | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 0.9,
        seed: int = 0,
        stop: Sequence[str] = (),
        quality: str = "",
    ) -> str:
        """The assistant's answer to `messages`, the last of which is the user's.

        `on_text` hears of every piece of the answer as soon as it is certain. `quality` "good" or
        "bad" asks for such an answer, where the template has markers of them.

        Raises:
          ValueError: no template; roles out of order; no marker for `quality`; a conversation
            longer than the context.
        """
        begun = False

        def on_answer(_: int, text: str) -> None:
            nonlocal begun
            text = text if begun else text.lstrip()  # models write a space before an answer
            begun = begun or bool(text)
            if text:
                on_text(text)

        ids = self._chat_ids(messages, quality)
        stop, stop_ids = self._ends_of_turn(stop)
        answer = self.generate(
            [ids],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            stop_ids=stop_ids,
            on_text=on_answer if on_text else None,
        )
        return answer[0].text.strip()

    def chat_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 0.9,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        quality: str = "",
        batch_size: int = 16,
        on_done: OnDone | None = None,
    ) -> list[str]:
        """What `chat` answers to each of many conversations, with one `seed` or one for each.

        Raises:
          ValueError: as `chat`.
        """
        rows = [self._chat_ids(messages, quality) for messages in conversations]
        own = [seed] * len(rows) if isinstance(seed, int) else _seeds(seed, len(rows))
        stop, stop_ids = self._ends_of_turn(stop)
        made = self._complete(
            rows,
            sampling=SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p),
            seeds=[number for one in own for number in _seeds(one, 1)],  # those of `chat`
            limits=[max_new_tokens] * len(rows),
            stop=stop,
            stop_ids=stop_ids,
            batch_size=batch_size,
            on_done=on_done,
        )
        return [completion.text.strip() for (completion,) in made]

    def _chat_ids(self, messages: Sequence[Message], quality: str) -> list[int]:
        """The conversation as the template writes it, up to where the answer begins."""
        if self.template is None:
            raise ValueError(
                "the model came without a chat template: name one, such as load(path, "
                'template="vicuna") or --template=plain'
            )
        segments = render(self.template, messages, generate=True, quality=quality)
        ids = [i for segment in segments for i in encode_segment(segment, self._tokenizer)]
        self._check(ids, room=1)
        return ids

    def _ends_of_turn(self, stop: Sequence[str]) -> tuple[list[str], list[int]]:
        """The strings and ids that end an answer by the template or by `stop`."""
        end = end_token(self.template)
        return [*self.template.stop, *stop], [self._tokenizer.special_id(end)] if end else []

    def loglikelihood(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        truncate: bool = False,
        on_done: OnDone | None = None,
    ) -> list[Likelihood]:
        """log p(continuation | context) for every (context, continuation).

        Both are encoded together, after a BOS if the model expects one. The continuation's ids are
        those that come after as many as the context alone has; white space at the end of a context
        counts as the continuation's, since tokenizers join it to the next word (lm-eval's rule).
        Where nothing remains of the context, BOS stands for it, or EOS if the model has no BOS.
        `truncate` is explained at `loglikelihood_tokens`.

        Raises:
          ValueError: a continuation without a token; a pair that does not fit.
        """
        encode, prefix = self._tokenizer.prompt_ids, self._prefix_id
        starts: dict[str, int] = {}  # contexts come several times, one with each choice
        rows = []
        for context, continuation in pairs:
            kept = context.rstrip()
            continuation = context[len(kept) :] + continuation
            if not kept:
                ids, start = [prefix, *self._tokenizer.encode(continuation)], 1
            else:
                ids = encode(kept + continuation)
                start = starts.setdefault(kept, 0) or len(encode(kept))
                starts[kept] = start
            if not 0 < start < len(ids):
                raise ValueError(
                    f"cannot score {continuation!r} after {kept!r}: encoded together they have "
                    f"{len(ids)} tokens, the context alone {start}; expected at least one of each"
                )
            rows.append((ids[:start], ids[start:]))
        return self.loglikelihood_tokens(rows, truncate=truncate, on_done=on_done)

    def loglikelihood_tokens(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        truncate: bool = False,
        on_done: OnDone | None = None,
    ) -> list[Likelihood]:
        """`loglikelihood` of (context ids, continuation ids), to which nothing is added.

        The model reads all but the last id, so context and continuation may have one id more than
        its context. Of more, `truncate` keeps the last ones (lm-eval's rule; a BOS is cut off with
        the rest of the beginning).

        Raises:
          ValueError: an empty context or continuation; ids that the model does not know; without
            `truncate` a pair, with it a continuation, that does not fit.
        """
        rows = []
        for context, continuation in pairs:
            most = self.config.max_seq_len + 1
            if truncate and len(continuation) < most:
                context = context[max(len(context) + len(continuation) - most, 0) :]
            if not context or not continuation:
                raise ValueError(
                    f"cannot score {len(continuation)} tokens after {len(context)}: expected at "
                    "least one of each"
                )
            ids = (*context, *continuation)
            self._check(ids, room=-1)
            rows.append(Scored(ids, len(context)))
        with self._on_mesh():
            heard = (lambda done: on_done(len(done))) if on_done else None
            scored = score(self.params, rows, config=self.config, on_done=heard)
        return [_likelihood([one]) for one in scored]

    def loglikelihood_rolling(
        self, texts: Sequence[str], *, on_done: OnDone | None = None
    ) -> list[Likelihood]:
        """log p of every text as a document of its own, of any length; each token counts once.

        The first token follows BOS, or EOS if the model has no BOS. A text longer than the context
        is scored in windows: the first ones are full and do not overlap, the last has the model's
        whole context before its end (lm-eval's rule). An empty text has 0 tokens and log p 0.
        """
        size = self.config.max_seq_len
        windows, owners = [], []
        for owner, text in enumerate(texts):
            ids = self._tokenizer.encode(text)
            row = [self._prefix_id, *ids]
            self._check(row[:1], room=0)
            for start in range(1, len(row), size):
                end = min(start + size, len(row))
                first = max(end - 1 - size, 0)
                windows.append(Scored(tuple(row[first:end]), start - first))
                owners.append(owner)
        left = np.bincount(np.array(owners, int), minlength=len(texts))

        def on_windows(done: Sequence[int]) -> None:
            before = (left == 0).sum()
            np.subtract.at(left, [owners[i] for i in done], 1)
            if on_done and (finished := int((left == 0).sum() - before)):
                on_done(finished)

        if on_done and (empty := int((left == 0).sum())):
            on_done(empty)
        with self._on_mesh():
            scored = score(self.params, windows, config=self.config, on_done=on_windows)
        parts: list[list] = [[] for _ in texts]
        for owner, one in zip(owners, scored, strict=True):
            parts[owner].append(one)
        return [_likelihood(own) for own in parts]

    @property
    def _prefix_id(self) -> int:
        """What stands before a text that nothing stands before."""
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        return eos if bos is None else bos

    def token_log_probs(
        self, rows: Sequence[Sequence[int]], *, batch_size: int = 8
    ) -> list[tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
        """For every row of ids: log p of each but the first, and 1.0 where it is the best guess."""
        found = {}
        for batch in _batches(list(map(len, rows)), batch_size):
            for i in batch:
                self._check(rows[i], room=0)
            with self._on_mesh():
                tokens, lengths = pad_prompts(
                    [rows[i] for i in batch], rows_multiple=num_row_shards()
                )
                scores = jax.device_get(_scores(self.params, tokens, lengths, config=self.config))
            for row, i in enumerate(batch):
                losses, is_best = (x[row, : len(rows[i]) - 1] for x in scores)
                found[i] = (-losses, is_best)
        return [found[i] for i in range(len(rows))]

    def logits(
        self, token_ids: Sequence[int] | Int[np.ndarray, "..."]
    ) -> Float[np.ndarray, "... V"]:
        """Logits after each id of one row [T] or of rows of equal length [B, T], float32."""
        ids = np.asarray(token_ids, np.int32)
        rows = ids.reshape(-1, ids.shape[-1] or 1).tolist()
        for row in rows or [[]]:
            self._check(row, room=0)
        with self._on_mesh():
            tokens, lengths = pad_prompts(rows, rows_multiple=num_row_shards())
            logits = jax.device_get(_logits(self.params, tokens, lengths, config=self.config))
        return logits[: len(rows), : ids.shape[-1]].reshape(*ids.shape, -1)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "the model came without a tokenizer: give load(path, tokenizer=...) one"
            )
        return self.tokenizer

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _prompt_ids(self, prompt: str | Sequence[int], room: int = 0) -> list[int]:
        """The prompt's ids; with `room`, at most as many of the last as leave it."""
        ids = self._tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)
        ids = ids[-max(self.config.max_seq_len - room, 1) :] if room else ids
        self._check(ids, room=1)
        return ids

    def _check(self, ids: Sequence[int], *, room: int) -> None:
        """`room` is for how many more ids; -1 where the last is never read."""
        if not ids:
            raise ValueError("there are no tokens: expected at least one")
        size = self.config.max_seq_len
        if len(ids) + room > size:
            more = " and one more" if room > 0 else ""
            raise ValueError(
                f"{min(len(ids), len(ids) + room)} tokens{more} do not fit into the model's "
                f"context of {size}: shorten them"
            )
        if wrong := [i for i in ids if not 0 <= i < self.config.vocab_size]:
            raise ValueError(
                f"the ids {wrong[:5]} are not of the model's vocabulary, 0 to "
                f"{self.config.vocab_size - 1}; use the model's own tokenizer"
            )


def _likelihood(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Likelihood:
    """Of what `score` says of the pieces of one text."""
    total = sum(float(log_probs.sum(dtype=np.float64)) for log_probs, _ in parts)
    is_greedy = all(bool(is_best.all()) for _, is_best in parts)
    return Likelihood(float(total), is_greedy, sum(len(log_probs) for log_probs, _ in parts))


class _Writer:
    """The text of one row in the making."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        ends: Sequence[int],
        place: int,
        on_text: OnText | None,
    ) -> None:
        self._stream = TextStream(tokenizer, stop, continuation=True)
        self._ends, self._place, self._on_text = frozenset(ends), place, on_text
        self._ids: list[int] = []
        self._text = ""

    def show(self, ids: list[int], *, last: bool) -> bool:
        """Take the row's ids so far; whether a stop string has ended it."""
        new = ""
        for token in ids[len(self._ids) :]:
            if not self._stream.finished:  # the ids after a stop string are dropped
                self._ids.append(token)
                new += "" if token in self._ends else self._stream.push([token])
        new += self._stream.close() if last else ""
        self._text += new
        if new and self._on_text:
            self._on_text(self._place, new)
        return self._stream.finished

    def completion(self, log_probs: Float[np.ndarray, " M"]) -> Completion:
        ended = self._stream.finished or (self._ids and self._ids[-1] in self._ends)
        return Completion(
            text=self._text,
            ids=self._ids,
            log_probs=log_probs[: len(self._ids)].tolist(),
            finish_reason="stop" if ended else "length",
        )


def _show(writers: Sequence[_Writer], made: Generated, *, last: bool = False) -> list[int]:
    """Every row to its writer; the rows that a stop string has ended."""
    rows = zip(writers, made.tokens, made.count, strict=True)
    ended = [writer.show(ids[:count].tolist(), last=last) for writer, ids, count in rows]
    return [row for row, stop in enumerate(ended) if stop]


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with, and at least one more follows; 0 if it is little work."""
    common = len(os.path.commonprefix(list(rows)))  # works on any sequences
    common = min([common, *(len(row) - 1 for row in rows)])
    return common if common * (len(rows) - 1) >= MIN_PREFIX_WORK else 0


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")


def _seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    if isinstance(seed, int | np.integer):
        return np.random.SeedSequence(abs(int(seed))).generate_state(rows).tolist()
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds were given for {rows} completions: give one for each")
    return [int(s) % 2**32 for s in seed]


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in groups of similar length, so that little is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _hidden(params: Params, tokens: Tokens, lengths: Array, config: LlamaConfig) -> Array:
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    segments = (slots < lengths[:, None]).astype(jnp.int32)
    return inference_model(params, config).apply({"params": params}, tokens, segments, slots)[0]


@functools.partial(jax.jit, static_argnames=("config",))
def _scores(params: Params, tokens: Tokens, lengths: Array, *, config: LlamaConfig):
    """Losses [B, T] of the next tokens, and whether they are the best guesses; the last is void."""
    hidden_BTD = _hidden(params, tokens, lengths, config)
    scores = token_losses(hidden_BTD, output_kernel(params), jnp.roll(tokens, -1, axis=1))
    return tuple(constrain(x, None, None) for x in scores)  # every host reads all of them


@functools.partial(jax.jit, static_argnames=("config",))
def _logits(params: Params, tokens: Tokens, lengths: Array, *, config: LlamaConfig):
    return constrain(output_logits(params, _hidden(params, tokens, lengths, config)), *[None] * 3)
