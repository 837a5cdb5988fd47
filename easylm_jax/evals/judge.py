"""Judges: who says which of two answers is better. A model, a server, or a bias that needs neither.

    judge = parse_judge("https://api.example.org#gpt-4", load=easylm_jax.load)
    for place, text in judge.decide([Case(messages, answers)]): ...

What it is not: what judges are asked, the reading of their verdicts, and what these come to, all in
`judgements.py`, which calls this, as does evaluate.py.
"""

import concurrent.futures
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from easylm_jax.language_model import LanguageModel

KEY_VARIABLE = "EASYLM_JUDGE_KEY"  # of the environment: what a URL is given as its bearer token
MAX_NEW_TOKENS = 1024  # of a verdict with its reasons
TRIES = 6  # of a request, with waits of 1, 2, 4, 8 and 16 seconds between them
TIMEOUT = 180.0  # seconds
AT_ONCE = 8  # requests
LM_BATCH = 16


class Case(NamedTuple):
    """What a judge is asked: the messages, and the answers that stand in them, as seated."""

    messages: list[dict[str, str]]
    answers: tuple[str, ...]


class Judge(NamedTuple):
    """`decide` yields the place of a case and what was said of it, in any order, as it comes."""

    name: str
    decide: Callable[[Sequence[Case]], Iterator[tuple[int, str]]]


def parse_judge(spec: str, *, load: Callable[[str], LanguageModel]) -> Judge:
    """What --judge names: always_a, longest, http(s)://HOST[#MODEL], or what `load` can load."""
    if spec in BIASED:
        return BIASED[spec]
    if spec.startswith(("http://", "https://")):
        url, _, model = spec.partition("#")
        return url_judge(url, model=model, key=os.environ.get(KEY_VARIABLE, ""))
    return model_judge(load(spec), name=spec)


def _always_a(cases: Sequence[Case]) -> Iterator[tuple[int, str]]:
    for place, _ in enumerate(cases):
        yield place, "[[A]]"


def _longest(cases: Sequence[Case]) -> Iterator[tuple[int, str]]:
    for place, case in enumerate(cases):
        first, second = map(len, case.answers)
        yield place, "[[C]]" if first == second else "[[A]]" if first > second else "[[B]]"


# They show what a judge's leaning looks like in a report. They judge pairs alone.
BIASED = {"always_a": Judge("always_a", _always_a), "longest": Judge("longest", _longest)}


def model_judge(lm: LanguageModel, *, name: str) -> Judge:
    """A model of ours, greedily. What does not fit in its context gets the reason as an answer."""

    def say(cases: Sequence[Case]) -> list[str]:
        conversations = [case.messages for case in cases]
        try:
            return lm.chat_batch(conversations, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
        except ValueError as error:
            if len(cases) == 1:
                return [f"not judged: {error}"]
            return [said for case in cases for said in say([case])]

    def decide(cases: Sequence[Case]) -> Iterator[tuple[int, str]]:
        for start in range(0, len(cases), LM_BATCH):
            yield from enumerate(say(cases[start : start + LM_BATCH]), start=start)

    return Judge(name, decide)


def url_judge(url: str, *, model: str = "", key: str = "", first_wait: float = 1.0) -> Judge:
    """A server with OpenAI's chat completions at URL/v1/chat/completions, temperature 0."""
    place = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    settings = {"model": model} if model else {}

    def decide(cases: Sequence[Case]) -> Iterator[tuple[int, str]]:
        stop = threading.Event()

        def say(case: Case) -> str | None:
            body = settings | {"messages": case.messages, "temperature": 0}
            body["max_tokens"] = MAX_NEW_TOKENS
            return _post(place, body, headers=headers, first_wait=first_wait, stop=stop)

        failure = None
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            places = {pool.submit(say, case): i for i, case in enumerate(cases)}
            try:
                for future in concurrent.futures.as_completed(places):
                    if future.exception() is not None:
                        failure = failure or future.exception()
                        stop.set()
                    elif future.result() is not None:
                        yield places[future], future.result()
            finally:  # also if nobody wants to hear more
                stop.set()
        if failure is not None:
            raise failure

    return Judge(model or url, decide)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would take the key along to wherever it is sent."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _post(
    url: str,
    body: Mapping[str, Any],
    *,
    headers: Mapping[str, str],
    first_wait: float,
    stop: threading.Event,
) -> str | None:
    """The text of the completion, after TRIES at most; None if `stop` was set before."""
    if stop.is_set():
        return None
    request = urllib.request.Request(url, json.dumps(body).encode(), dict(headers))
    for number in range(TRIES):
        try:
            with _OPENER.open(request, timeout=TIMEOUT) as response:
                return _content(response.read(), url)
        except urllib.error.HTTPError as error:
            reason = (
                f"{error.code} {error.reason}: {shorten(error.read().decode(errors='replace'))}"
            )
            if error.code not in (408, 409, 429) and error.code < 500:
                raise ValueError(f"the judge at {url} refuses: {reason}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSError
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if number < TRIES - 1 and stop.wait(first_wait * 2**number):
            return None
    raise ValueError(
        f"the judge at {url} did not answer in {TRIES} tries ({reason}): is it running? The "
        "judgements so far are kept, run the same again to go on"
    )


def _content(reply: bytes, url: str) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        said = shorten(reply.decode(errors="replace"))
        raise ValueError(f"{url} answers with no chat completion: {said!r}") from None
    return content if isinstance(content, str) else ""  # null, of a refusal


def shorten(text: str) -> str:
    """In one line, for messages."""
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
