"""The page of blind votes: seats and counting, the server's refusals, the file, a real browser."""

import base64
import contextlib
import http.client
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from easylm_jax import vote
from easylm_jax.vote import VoteServer, draw_seats, last_votes, open_poll, tally

MODELS = ("zebra-7b", "quagga-7b")
CHROMIUM = shutil.which("chromium")
JSON = {"Content-Type": "application/json"}


def write_answers(folder: Path, *, number: int = 6, texts: dict[str, str] | None = None) -> dict:
    """Two files of answers and one of questions; the arguments of `open_poll`."""
    for model in MODELS:
        text = (texts or {}).get(model, f"the way of {model[0]}s")
        rows = [
            {"question_id": i, "model_id": model, "choices": [{"turns": [f"{text} {i}", "and so"]}]}
            for i in range(number)
        ]
        (folder / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"question_id": i, "turns": [f"What is {i}?", "And then?"]} for i in range(number)]
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return {
        "answers": [str(folder / f"{model}.jsonl") for model in MODELS],
        "questions": str(folder / "question.jsonl"),
        "out": folder / "votes.jsonl",
    }


@contextlib.contextmanager
def serving(arguments: dict):
    """A server of its own, as after a restart. The file is free again at the end."""
    poll = open_poll(**arguments)
    with VoteServer(poll) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            poll.close()


def request(server, name: str, body=None, *, token=None, headers=None):
    """Status, headers and text, of a request like that of the page."""
    url = urlsplit(server.url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=20)
    method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
    path = f"/{server.token if token is None else token}/{name}"
    sent = ({} if body is None else JSON) | (headers or {})
    connection.request(method, path, data, sent)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, reply.headers, text


def ask(server, name: str, body=None, *, voter: str = "ann") -> dict:
    status, _, text = request(server, f"{name}?voter={voter}", body)
    assert status == 200, text
    return json.loads(text)


def vote_on(server, choice: str, *, voter: str = "ann") -> dict:
    revision = ask(server, "state", voter=voter)["revision"]
    body = {"vote": choice, "seconds": 1.5, "revision": revision}
    return ask(server, "vote", body, voter=voter)


def read_votes(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_seats_are_balanced_and_differ_between_voters():
    """Over voters, each question comes at each place and each model sits left equally often; who
    sits left tells nothing of the next question, but that one model has 5 of 9 in all."""
    ids, num_voters = list("012345678"), 2000
    left, place, alike = np.zeros(9), np.zeros((9, 9)), np.zeros(8)
    for number in range(num_voters):
        seats = draw_seats(ids, MODELS, voter=f"v{number}", seed=3)
        first = [seat.left == MODELS[0] for seat in seats]
        assert sum(first) in (4, 5)
        assert all({seat.left, seat.right} == set(MODELS) for seat in seats)
        alike += np.equal(first[1:], first[:-1])
        for at, seat in enumerate(seats):
            left[int(seat.question_id)] += first[at]
            place[int(seat.question_id), at] += 1
    assert np.abs(left / num_voters - 0.5).max() < 5 * 0.5 / num_voters**0.5
    assert np.abs(alike / num_voters - (5 * 4 + 4 * 3) / (9 * 8)).max() < 5 * 0.5 / num_voters**0.5
    assert np.abs(place / num_voters - 1 / 9).max() < 5 * (8 / 81 / num_voters) ** 0.5
    assert draw_seats(ids, MODELS, voter="v7", seed=3) != seats
    again = [draw_seats(ids, MODELS, voter="v1", seed=seed) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]


def test_the_last_record_of_a_voter_and_question_counts():
    """Against a walk from the end of random records."""
    rng = random.Random(0)
    records = [
        {"voter": rng.choice("ab"), "question_id": rng.choice("0123"), "vote": vote, "number": n}
        for n, vote in enumerate(rng.choices(["left", "tie", "undone"], k=60))
    ]
    expected = {}
    for record in reversed(records):
        expected.setdefault((record["voter"], record["question_id"]), record)
    expected = [r for r in reversed(expected.values()) if r["vote"] != "undone"]
    assert list(last_votes(records).values()) == expected


def test_tally_counts_models_not_seats():
    def record(question_id, left, vote, voter):
        left, right = MODELS if left else MODELS[::-1]
        return dict(question_id=str(question_id), left=left, right=right, vote=vote, voter=voter)

    votes = [
        record(1, True, "left", "a"),  # zebra
        record(1, False, "right", "b"),  # zebra, from the other side
        record(2, True, "tie", "a"),
        record(3, False, "left", "a"),  # quagga
        record(4, True, "skip", "a"),
        record(5, True, "left", "b"),  # zebra
    ]
    table = tally(votes, MODELS)
    zebra, quagga = table["rows"][1:]
    assert zebra[:4] == ["zebra-7b", "3", "1", "1"] and quagga[:4] == ["quagga-7b", "1", "1", "3"]
    assert zebra[4].startswith("70.0 ±") and quagga[4].startswith("30.0 ±")
    assert zebra[5].startswith("80.0 ±") and quagga[5].startswith("40.0 ±")
    assert "5 votes of 2 voters on 4 questions, 1 skipped" in table["notes"][0]
    assert "75.0" in table["notes"][1] and "100.0\u00a0%" in table["notes"][2]


def test_strangers_are_refused(tmp_path):
    with serving(write_answers(tmp_path)) as server:
        host = f"127.0.0.1:{server.server_port}"
        refused = [
            dict(token="x" * len(server.token)),
            dict(token=""),
            dict(headers={"Host": f"evil.example:{server.server_port}"}),
            dict(headers={"Host": "evil.example"}),
            dict(headers={"Origin": "https://evil.example"}),
            dict(headers={"Origin": "null"}),
        ]
        body = {"vote": "left", "seconds": 1, "revision": 0}
        for how in refused:
            for name, sent in [("", None), ("state?voter=ann", None), ("vote?voter=ann", body)]:
                status, _, text = request(server, name, sent, **how)
                assert status == 403 and "What is" not in text and server.token not in text, how
        for wrong in ("", None, {}, [], body | {"vote": "undone"}, body | {"seconds": -1}):
            assert request(server, "vote?voter=ann", wrong or "")[0] == 400
        assert request(server, "vote?voter=", body)[0] == 400
        assert request(server, "vote?voter=ann", {"x": "y" * 20_000})[0] == 413
        plain = {"Content-Type": "text/plain"}
        assert request(server, "vote?voter=ann", body, headers=plain)[0] == 415
        assert request(server, "vote?voter=ann")[0] == 404  # a link cannot vote
        assert not (tmp_path / "votes.jsonl").read_bytes()
        own = {"Host": host, "Origin": f"http://{host}"}
        assert request(server, "vote?voter=ann", body, headers=own)[0] == 200


def test_models_are_named_nowhere_before_the_result(tmp_path):
    with serving(write_answers(tmp_path / "")) as server:
        seen = []
        for choice in ("left", "tie", "right", "skip", "left"):
            seen.append(json.dumps(vote_on(server, choice)))
        revision = ask(server, "state")["revision"]
        seen.append(json.dumps(ask(server, "undo", {"revision": revision})))
        _, headers, page = request(server, "?voter=ann")
        seen += [page, str(headers), server.url]
        assert request(server, "result?voter=ann", {"revision": 0})[0] == 400
        assert not [text for text in seen if any(model in text for model in MODELS)]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        for _ in range(2):
            state = vote_on(server, "left")
        assert state["done"] == 6 and state["file"] == str(tmp_path / "votes.jsonl")
        result = ask(server, "result", {"revision": 0})
        assert [row[0] for row in result["rows"][1:]] == list(MODELS)
        state = ask(server, "undo", {"revision": state["revision"]})  # they know too much now
        assert not state["can_undo"] and "question" not in state


def test_a_restart_goes_on_and_the_file_only_grows(tmp_path):
    arguments = write_answers(tmp_path)
    out = arguments["out"]
    with serving(arguments) as server:
        shown = [ask(server, "state")]
        shown += [vote_on(server, choice) for choice in ("left", "right")]
        vote_on(server, "tie", voter="bob")
        with pytest.raises(ValueError, match="in use"):
            open_poll(**arguments)
    before = out.read_bytes()
    out.write_bytes(before + b'{"question_id": 1, "left": "zeb')  # as after a power cut
    with serving(arguments) as server:
        assert out.read_bytes() == before
        assert ask(server, "state") == shown[-1]
        assert ask(server, "state", voter=" Ann".replace(" ", "%20")) == shown[-1]
        undone = ask(server, "undo", {"revision": 2})
        assert undone["done"] == 1 and undone["question"] == shown[1]["question"]
        assert undone["left"] == shown[1]["left"]  # in the same seats
        assert out.read_bytes().startswith(before)
        vote_on(server, "left")
        assert ask(server, "state", voter="bob")["done"] == 1
    records = read_votes(out)
    assert [r["vote"] for r in records] == ["left", "right", "tie", "undone", "left"]
    assert [r["voter"] for r in records] == ["ann", "ann", "bob", "ann", "ann"]
    assert all(set(r) == set(vote.KEYS) for r in records)
    texts = {"zebra-7b": "the way of zs", "quagga-7b": "the way of qs"}
    for record, state in zip(records[:2], shown, strict=False):
        for side in ("left", "right"):
            assert state[side][0] == f"{texts[record[side]]} {record['question_id']}"


def test_two_windows_count_once(tmp_path):
    with serving(write_answers(tmp_path)) as server:
        body = {"vote": "left", "seconds": 1, "revision": 0}
        replies = []

        def press() -> None:
            replies.append(ask(server, "vote", body))

        threads = [threading.Thread(target=press) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum("notice" not in reply for reply in replies) == 1
        assert {reply["done"] for reply in replies} == {1}
        assert len(read_votes(tmp_path / "votes.jsonl")) == 1


def test_a_vote_that_cannot_be_written_is_no_vote(tmp_path, monkeypatch):
    with serving(write_answers(tmp_path)) as server:
        vote_on(server, "left")
        before = (tmp_path / "votes.jsonl").read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            body = {"vote": "left", "seconds": 1, "revision": 1}
            status, _, text = request(server, "vote?voter=ann", body)
        assert status == 500 and "No space left" in text
        assert (tmp_path / "votes.jsonl").read_bytes() == before
        assert vote_on(server, "right")["done"] == 2


def test_what_does_not_fit_is_one_sentence(tmp_path):
    arguments = write_answers(tmp_path)
    vote_file = arguments["out"]

    def refuses(match: str, **changes) -> None:
        with pytest.raises(ValueError, match=match):
            open_poll(**(arguments | changes))

    refuses("expected two", answers=arguments["answers"][:1])
    refuses("both answers of zebra-7b", answers=arguments["answers"][:1] * 2)
    refuses("missing.jsonl", answers=[arguments["answers"][0], str(tmp_path / "missing.jsonl")])
    refuses("do not say what was asked", questions="")
    other = tmp_path / "other.jsonl"
    row = {"question_id": 77, "model_id": "okapi", "choices": [{"turns": ["x"]}]}
    other.write_text(json.dumps(row) + "\n")
    refuses(
        "no question of .*question.jsonl in common", answers=[arguments["answers"][0], str(other)]
    )
    other.write_text(json.dumps({"question_id": 77, "turns": ["x"]}) + "\n")
    refuses("no question of .*other.jsonl in common", questions=str(other))
    record = dict.fromkeys(vote.KEYS, "x") | {"left": "zebra-7b", "right": "okapi"}
    vote_file.write_text(json.dumps(record) + "\n")
    refuses("a vote on okapi and zebra-7b, not on quagga-7b and zebra-7b: name another --out")
    vote_file.write_text("[]\n")
    refuses(r"votes.jsonl:1 is no vote")


def test_questions_and_answers_in_other_layouts(tmp_path):
    """All that `evaluate` and the published sets have: one question, asked of two models."""

    def write(name: str, *rows: dict) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    layouts = [
        {"question_id": 7, "turns": ["Why so?"]},  # FastChat
        {"question_id": 7, "text": "Why so?"},  # the same before June 2023
        {"id": "7", "prompt": "Why so?"},  # Koala
        {"id": "7", "request": {"turns": ["Why so?"]}, "response": {}},  # evaluate's samples
        {"id": "7", "instruction": "Why", "instances": [{"input": "so?", "output": "-"}]},
    ]
    old = write("old.jsonl", {"question_id": 7, "model_id": "old", "text": "Thus."})
    new = write("new.jsonl", {"instruction": "Why  so?", "output": "So.", "generator": "new"})
    for number, layout in enumerate(layouts):
        questions = write("asked.jsonl", layout)
        poll = open_poll([old, new], questions, tmp_path / f"{number}.jsonl")
        state = poll.state("ann")
        assert " ".join(state["question"][0].split()) == "Why so?"
        assert {state["left"][0], state["right"][0]} == {"Thus.", "So."}
        poll.close()
    other = write("other.jsonl", {"instruction": "Why  so?", "output": "Well.", "generator": "x"})
    poll = open_poll([new, other], "", tmp_path / "none.jsonl")  # nothing but AlpacaEval's
    assert poll.state("ann")["question"] == ["Why  so?"]
    poll.close()


class Browser:
    """A headless Chromium, spoken to over its DevTools pipe, which needs no library."""

    def __init__(self, folder: Path):
        (read, self._write), (self._read, write) = os.pipe(), os.pipe()
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "-", CHROMIUM, "--headless"]
            + ["--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}"]
            + ["--remote-debugging-pipe", "about:blank"],
            pass_fds=(read, write),
            stderr=subprocess.DEVNULL,
        )
        os.close(read), os.close(write)
        self._unread, self._number, self.complaints = b"", 0, []

    def close(self) -> None:
        self.call("Browser.close")
        self._process.wait(timeout=20)
        os.close(self._read), os.close(self._write)

    def call(self, method: str, session: str | None = None, **params) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self._number:
            if reply.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(reply)
            if reply.get("method") == "Runtime.consoleAPICalled":
                self.complaints.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def _next(self) -> dict:
        while b"\0" not in self._unread:
            assert select.select([self._read], [], [], 30)[0], "the browser says nothing"
            self._unread += os.read(self._read, 1 << 20)
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)


class Tab:
    def __init__(self, browser: Browser, url: str):
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
        self._browser, self._session = browser, attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setFocusEmulationEnabled", enabled=True
        )  # no slow timers behind others
        self.call("Page.navigate", url=url)

    def call(self, method: str, **params) -> dict:
        return self._browser.call(method, self._session, **params)

    def run(self, script: str):
        how = dict(expression=script, returnByValue=True, awaitPromise=True)
        result = self.call("Runtime.evaluate", **how)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until it holds, in whatever page is there by then."""
        script = f"""new Promise((done) => {{
            const end = performance.now() + 10000;
            const look = () => {{
                let holds = false;
                try {{ holds = {condition}; }} catch {{}}
                if (holds || performance.now() > end) done(holds); else setTimeout(look, 10);
            }};
            look();
        }})"""
        holds = None
        while holds is None:
            with contextlib.suppress(AssertionError):  # a page that goes away takes it along
                holds = self.run(script)
        assert holds, f"never came true: {condition}"

    def press(self, key: str) -> None:
        self.wait("!state?.question || performance.now() - shownAt > REST_MS")
        code = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13}
        how = dict(key=key, windowsVirtualKeyCode=code.get(key, ord(key[0].upper())))
        text = {} if key.startswith("Arrow") else {"text": "\r" if key == "Enter" else key}
        self.call("Input.dispatchKeyEvent", type="keyDown", **how, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **how)

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@pytest.fixture
def browser(tmp_path):
    if not CHROMIUM:
        pytest.skip("there is no chromium here")
    browser = Browser(tmp_path / "chromium")
    yield browser
    browser.close()


def test_a_voter_at_the_keyboard(tmp_path, browser):
    hostile = {
        "zebra-7b": "<script>window.hacked = 1</script><b>bold</b>\n```\ncode <i>\n```\nstripes",
        "quagga-7b": '<img src="x" onerror="window.hacked = 1"></article><h1>ears',
    }
    arguments = write_answers(tmp_path, texts=hostile)
    with serving(arguments) as server:
        tab, pages = Tab(browser, server.url), []
        tab.wait("document.activeElement.id === 'name'")
        tab.call("Input.insertText", text="Ann B.")
        tab.press("Enter")
        tab.wait("location.search === '?voter=Ann+B.' && state?.done === 0")
        seats = []

        def look() -> None:
            pages.append(tab.run("document.documentElement.outerHTML + location.href"))
            sides = [tab.text("#left"), tab.text("#right")]
            assert ["stripes" in side for side in sides] != ["ears" in side for side in sides]
            assert "And then?" in sides[0] and "<script>" in "".join(sides)
            seats.append(MODELS["ears" in sides[0]])

        keys = {"1": "left", "ArrowDown": "tie", "ArrowRight": "right", "s": "skip", "3": "right"}
        for number, key in enumerate(keys, start=1):
            assert tab.text("#progress") == f"{number} of 6"
            look()
            tab.press(key)
            tab.wait(f"state.done === {number} && !busy")
        records = read_votes(arguments["out"])
        assert [r["vote"] for r in records] == list(keys.values())
        assert [r["left"] for r in records] == seats
        assert {r["voter"] for r in records} == {"ann b."}
        assert all(0.3 <= r["seconds"] < 30 for r in records)
        assert tab.text("#left pre") == "code <i>" if seats[-1] == "zebra-7b" else True

        tab.press("u")
        tab.wait("state.done === 4 && !busy")
        assert tab.text("#question").startswith(f"What is {records[-1]['question_id']}?")
        tab.call("Page.reload")
        tab.wait("state?.done === 4")
        other = Tab(browser, tab.run("location.href"))
        other.wait("state?.done === 4")
        tab.press("ArrowLeft")
        tab.wait("state.done === 5 && !busy")
        other.press("ArrowRight")  # on a question that was voted on
        other.wait("state.done === 5 && !busy")
        assert "Not counted" in other.text("#status")
        tab.press("ArrowDown")
        tab.wait("state.done === 6 && !busy")
        pages.append(tab.run("document.documentElement.outerHTML"))
        assert tab.text("#file") == str(arguments["out"])
        assert not [model for page in pages for model in MODELS if model in page]
        votes = [r["vote"] for r in read_votes(arguments["out"])]
        assert votes == [*keys.values(), "undone", "left", "tie"]

        assert tab.run("document.images.length + document.scripts.length") == 1
        assert tab.run("window.hacked === undefined")
        tab.run("document.getElementById('show').click()")
        tab.wait("document.querySelectorAll('#result td').length === 12")
        assert MODELS[0] in tab.text("#result")
    assert not browser.complaints


def test_votes_and_judgements_are_compared_on_the_command_line(tmp_path):
    """In a process of its own, as flags are; nobody is asked for answers and nothing is served."""
    seats = dict(left=MODELS[1], right=MODELS[0], seconds=1.0, time="", voter="ann")
    records = [seats | {"question_id": "1", "vote": vote} for vote in ("left", "undone", "right")]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    judged = [
        {"question_id": "1", "turn": 1, "order": order, "a": MODELS[0], "b": MODELS[1],
         "judge": "j", "verdict": "a", "len_a": 1, "len_b": 2}
        for order in ("ab", "ba")
    ]  # fmt: skip
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(r) + "\n" for r in judged))
    (tmp_path / "grades.jsonl").write_text('{"question_id": "1", "turn": 1, "rating": 7}\n')
    command = [sys.executable, "-m", "easylm_jax.vote", f"--votes={tmp_path}/votes.jsonl"]
    done = subprocess.run(
        [*command, f"--judgements={tmp_path}/judged.jsonl"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "j: 1 votes on 1 questions" in done.stdout
    assert re.search(r"majority of all +100.0 % +1 ", done.stdout)
    assert re.search(r"majority chose the longer answer +0.0 % +1 ", done.stdout)
    assert re.search(r"two voters agree +- +0 ", done.stdout)
    with pytest.raises(ValueError, match=r"grades.jsonl:1 is no judgement of a pair, it lacks a, "):
        vote.read_pair_judgements([str(tmp_path / "grades.jsonl")])
    with pytest.raises(ValueError, match=r"there is no .*none.jsonl"):
        vote.read_votes([str(tmp_path / "none.jsonl")])
