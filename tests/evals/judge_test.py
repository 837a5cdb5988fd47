"""Judges: a server that fails in every way servers do, models of ours, and the biased ones."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import pytest

from easylm_jax.evals.judge import (
    BIASED,
    KEY_VARIABLE,
    Case,
    model_judge,
    parse_judge,
    url_judge,
)
from easylm_jax.language_model import LanguageModel


def cases(*texts: str) -> list[Case]:
    return [Case([{"role": "user", "content": text}], ("x", "y")) for text in texts]


def completion(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def serve():
    """`serve(reply)` -> URL, requests; `reply(number, text)` -> status, body, headers."""
    servers = []

    def start(reply):
        requests, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    requests.append((self.path, dict(self.headers), body))
                    number = len(requests)
                status, content, headers = reply(number, body["messages"][-1]["content"])
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_every_case_gets_its_own_answer_and_the_server_what_it_needs(serve):
    url, requests = serve(lambda _, text: (200, completion(text.upper()), {}))
    judge = url_judge(url + "/v1/", model="gpt-4", key="secret")
    texts = [f"case {i}" for i in range(30)]
    assert dict(judge.decide(cases(*texts))) == {i: t.upper() for i, t in enumerate(texts)}
    path, headers, body = requests[0]
    assert (judge.name, path) == ("gpt-4", "/v1/chat/completions")
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("gpt-4", 0)


def test_a_server_that_stumbles_is_asked_again(serve):
    url, requests = serve(
        lambda n, _: ((429, b"slow down", {}), (503, b"", {}), (200, completion("yes"), {}))[n - 1]
    )
    assert list(url_judge(url, first_wait=0.001).decide(cases("?"))) == [(0, "yes")]
    assert len(requests) == 3


def test_a_refusal_is_an_answer_without_a_verdict(serve):
    url, _ = serve(lambda *_: (200, completion(None), {}))
    assert list(url_judge(url).decide(cases("?"))) == [(0, "")]


def test_a_server_that_is_not_there_is_named(serve):
    url, _ = serve(lambda *_: (500, b"out of memory", {}))
    judge = url_judge(url, first_wait=0.001)
    with pytest.raises(ValueError, match=f"{url}/v1.* did not answer in 6 tries .500.*memory"):
        list(judge.decide(cases("?")))
    closed = url_judge("http://127.0.0.1:9", first_wait=0.001)
    with pytest.raises(ValueError, match="did not answer in 6 tries .*refused"):
        list(closed.decide(cases("?", "?")))


@pytest.mark.parametrize(
    "reply, message",
    [
        ((401, b'{"error": "wrong key"}', {}), "refuses: 401 Unauthorized: .*wrong key"),
        ((200, b"<html>", {}), "no chat completion: '<html>'"),
        ((200, b'{"choices": []}', {}), "no chat completion"),
        ((302, b"", {"Location": "/elsewhere"}), "refuses: 302"),  # the key stays here
    ],
)
def test_what_no_second_try_mends_is_said_at_once(serve, reply, message):
    url, requests = serve(lambda *_: reply)
    with pytest.raises(ValueError, match=message) as raised:
        list(url_judge(url, key="secret").decide(cases("?")))
    assert len(requests) == 1 and "secret" not in str(raised.value)


def test_answers_that_came_before_a_failure_are_not_lost(serve):
    def reply(_, text):
        return (400, b"no", {}) if text == "5" else (200, completion(text), {})

    url, requests = serve(reply)
    got = []
    with pytest.raises(ValueError, match="400"):
        for place, text in url_judge(url).decide(cases(*map(str, range(60)))):
            got.append((place, text))
    assert {(i, str(i)) for i in range(5)} <= set(got)
    assert len(got) == len(requests) - 1 < 59  # all that were asked, and no others were


def test_a_model_judges_greedily_and_what_does_not_fit_is_no_end():
    def chat_batch(conversations, *, temperature, **_):
        assert temperature == 0
        texts = [c[-1]["content"] for c in conversations]
        if "long" in texts:
            raise ValueError("5000 tokens do not fit")
        return [text + "!" for text in texts]

    lm = mock.create_autospec(LanguageModel, instance=True)
    lm.chat_batch.side_effect = chat_batch
    texts = [f"{i}" for i in range(20)] + ["long", "last"]
    found = dict(model_judge(lm, name="m").decide(cases(*texts)))
    expected = [t + "!" if t != "long" else "not judged: 5000 tokens do not fit" for t in texts]
    assert [found[i] for i in range(len(texts))] == expected


def test_what_judge_says_names_a_judge(monkeypatch, serve):
    lm = mock.create_autospec(LanguageModel, instance=True)
    asked = []

    def load(path: str) -> LanguageModel:
        asked.append(path)
        return lm

    assert parse_judge("longest", load=load) == BIASED["longest"]
    assert parse_judge("runs/judge", load=load).name == "runs/judge" and asked == ["runs/judge"]
    url, requests = serve(lambda *_: (200, completion("ok"), {}))
    monkeypatch.setenv(KEY_VARIABLE, "of the environment")
    judge = parse_judge(f"{url}#local/model", load=load)
    assert list(judge.decide(cases("?"))) == [(0, "ok")]
    assert (judge.name, requests[0][2]["model"]) == ("local/model", "local/model")
    assert requests[0][1]["Authorization"] == "Bearer of the environment"


def test_the_biased_judges_do_what_they_are_called():
    pairs = [Case([], pair) for pair in (("aa", "b"), ("a", "bb"), ("a", "b"))]
    assert [text for _, text in BIASED["always_a"].decide(pairs)] == ["[[A]]"] * 3
    assert [text for _, text in BIASED["longest"].decide(pairs)] == ["[[A]]", "[[B]]", "[[C]]"]
