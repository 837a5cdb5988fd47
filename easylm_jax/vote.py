"""A page for blind votes, and what a judge has in common with them.

    python -m easylm_jax.vote --answers=A/answers/koala.jsonl,B/answers/koala.jsonl \\
        --questions=A/samples/koala.jsonl --out=votes.jsonl
    python -m easylm_jax.vote --votes=votes.jsonl --judgements=A/judgements/koala.B.jsonl

People compare the answers of two models as Koala's raters did: the two side by side, seats and
order drawn for each voter, "left is better", "about equal" or "right is better". What it is not: a
survey service. It serves this machine's browsers, or through `ssh -L` those of other machines.

Every vote is a line of --out, on disk before the page shows the next question:

    {"question_id", "left": model, "right": model, "vote", "voter", "seconds", "time"}

`vote` is left, tie, right, skip or undone. The file only grows: the last line of a (voter,
question) counts, and "undone" says that there is none. The browser never learns which model sits
where; it gets the models' names with the result, which a voter can ask for when all is voted on.
Answers are untrusted: they reach the page as JSON and enter it as text (`vote.html.jinja`).
"""

import contextlib
import datetime
import errno
import fcntl
import hmac
import json
import math
import os
import random
import secrets
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import jinja2
from absl import flags

from easylm_jax.config import run_main
from easylm_jax.data.readers import read_records
from easylm_jax.evals.chat_answers import Answers, read_answers, text_key
from easylm_jax.evals.raters import format_agreement, join
from easylm_jax.evals.results import Estimate
from easylm_jax.evals.win_rate import agreement, mean

CHOICES = ("left", "tie", "right", "skip")
UNDONE = "undone"
KEYS = ("question_id", "left", "right", "vote", "voter", "seconds", "time")
MAX_BODY = 10_000  # bytes of a request
OVERTAKEN = "Not counted: another window has gone on under this name. Go on here."

Record = dict[str, Any]


class Seat(NamedTuple):
    """A question as one voter gets it: which model sits where."""

    question_id: str
    left: str
    right: str


def draw_seats(ids: Sequence[str], models: tuple[str, str], *, voter: str, seed: int) -> list[Seat]:
    """All questions in the order of this voter; each model sits left in half of them."""
    rng = random.Random(f"{seed} {voter}")
    order = rng.sample(list(ids), len(ids))
    sides = [models, models[::-1]]
    rng.shuffle(sides)  # who is left once more often, if the number is odd
    sides = (sides * len(ids))[: len(ids)]
    rng.shuffle(sides)
    return [Seat(i, *side) for i, side in zip(order, sides, strict=True)]


def last_votes(records: Sequence[Record]) -> dict[tuple[str, str], Record]:
    """What counts, by (voter, question id), in the order in which it was voted."""
    votes: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record["voter"], record["question_id"])
        votes.pop(key, None)
        if record["vote"] != UNDONE:
            votes[key] = record
    return votes


def spell(name: str) -> str:
    """The voter's name as the file has it, so that Ann and " ann" are one person."""
    voter = " ".join(name.split()).casefold()
    if not (0 < len(voter) <= 40 and voter.isprintable()):
        raise ValueError(f"a voter's name has 1 to 40 printable characters, not {name!r}")
    return voter


def tally(votes: Sequence[Record], models: tuple[str, str]) -> dict[str, list[Any]]:
    """A table of the two models, its head first, and what should be known beside it."""
    judged = [vote for vote in votes if vote["vote"] != "skip"]
    if not judged:
        return {"rows": [], "notes": ["There is no vote that was not skipped."]}
    questions = [vote["question_id"] for vote in judged]
    rows = [["Model", "Won", "Tied", "Lost", "Win rate", "At least tied"]]
    for model in models:
        scores = [
            0.5 if vote["vote"] == "tie" else float(vote[vote["vote"]] == model) for vote in judged
        ]
        counts = [str(scores.count(score)) for score in (1.0, 0.5, 0.0)]
        at_least = [float(score > 0) for score in scores]
        rates = [_percent(mean(values, questions)) for values in (scores, at_least)]
        rows.append([model, *counts, *rates])
    voters = list(dict.fromkeys(vote["voter"] for vote in judged))
    notes = [
        f"{_count(len(judged), 'vote')} of {_count(len(voters), 'voter')} on "
        f"{_count(len(set(questions)), 'question')}, {len(votes) - len(judged)} skipped. A tie is "
        "half a win; ± is one standard error over questions."
    ]
    if decided := [float(vote["vote"] == "left") for vote in judged if vote["vote"] != "tie"]:
        rate = _percent(mean(decided))
        notes.append(f"The left answer was the better one in {rate} of votes without a tie.")
    said: dict[Any, list[str]] = {i: [] for i in questions}
    for vote in judged:  # of models, as seats differ between voters
        said[vote["question_id"]].append(vote.get(vote["vote"], "tie"))
    if (agreed := agreement(list(said.values()))).n:
        notes.append(f"Two voters say the same of a question in {_percent(agreed)} of cases.")
    return {"rows": rows, "notes": notes}


def _percent(share: Estimate) -> str:
    more = "" if share.stderr is None else f" ± {100 * share.stderr:.1f}"
    return f"{100 * share.value:.1f}{more}\u00a0%"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


class VoteFile:
    """The file of votes, which one process at a time appends to."""

    def __init__(self, path: Path, models: set[str]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.records = path, []
        self._file = open(path, "ab+", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process
        except OSError:
            raise ValueError(
                f"{path} is in use by another vote page: vote there, or name another --out"
            ) from None
        self._file.seek(0)
        *lines, rest = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            self.records.append(_read_record(line, f"{path}:{number}", models))
        if rest:  # a machine went down while this was written; no voter was told that it is saved
            self._file.truncate(self._file.tell() - len(rest))

    def append(self, record: Record) -> None:
        """On disk when this returns; the file is as before if it fails."""
        line = json.dumps(record).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise
        self.records.append(record)

    def close(self) -> None:
        self._file.close()


def _read_record(line: bytes, where: str, models: set[str] | None = None) -> Record:
    try:
        record = json.loads(line)
        found = {record["left"], record["right"]}
        whole = set(KEYS) <= set(record)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{where} is no vote: expected an object with {', '.join(KEYS)}") from None
    if models and found != models:
        raise ValueError(
            f"{where} is a vote on {' and '.join(sorted(found))}, not on "
            f"{' and '.join(sorted(models))}: name another --out"
        )
    return record


def read_votes(paths: Sequence[str]) -> list[Record]:
    """The votes that count, of files of any models."""
    polls: dict[frozenset[str], list[Record]] = {}
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"there is no {path}: name a file that the vote page wrote")
        *lines, _ = Path(path).read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            record = _read_record(line, f"{path}:{number}")
            polls.setdefault(frozenset({record["left"], record["right"]}), []).append(record)
    return [vote for poll in polls.values() for vote in last_votes(poll).values()]


def read_pair_judgements(paths: Sequence[str]) -> list[Record]:
    """Of pairs alone, which evaluate keeps apart from grades."""
    judged = []
    for where, record in read_records(paths, counts=Counter()):
        if lacking := {"question_id", "turn", "a", "b", "order", "verdict"} - set(record):
            raise ValueError(
                f"{where} is no judgement of a pair, it lacks {', '.join(sorted(lacking))}: name "
                "a file of OUT/judgements that evaluate wrote with --against"
            )
        judged.append(record)
    return judged


class Poll:
    """The questions, the two models' answers and the votes on them."""

    def __init__(
        self,
        a: Answers,
        b: Answers,
        questions: Mapping[str, Sequence[str]],
        file: VoteFile,
        *,
        seed: int = 0,
    ):
        self._models = (a.model, b.model)
        self._turns = {a.model: a.turns, b.model: b.turns}
        self._questions, self._file, self._seed = questions, file, seed
        self._unblinded: set[str] = set()
        self._lock = threading.RLock()

    def close(self) -> None:
        """Free the file of votes for others."""
        self._file.close()

    def summary(self) -> str:
        """A line for the terminal."""
        votes = last_votes(self._file.records)
        voters = {voter for voter, _ in votes}
        return (
            f"{_count(len(self._questions), 'question')}, {_count(len(votes), 'vote')} of "
            f"{_count(len(voters), 'voter')} in {self._file.path}"
        )

    def state(self, voter: str, *, notice: str = "") -> Record:
        """What the voter's page shows now."""
        with self._lock:
            records = [r for r in self._file.records if r["voter"] == voter]
            votes = last_votes(records)
            seats = self._seats(voter)
            open_seats = [seat for seat in seats if (voter, seat.question_id) not in votes]
            state: Record = {
                "total": len(seats),
                "done": len(seats) - len(open_seats),
                "revision": len(records),
                "can_undo": bool(votes) and voter not in self._unblinded,
            }
            if notice:
                state["notice"] = notice
            if not open_seats:
                return state | {"file": str(self._file.path.absolute())}
            i, left, right = open_seats[0]
            return state | {
                "question": self._questions[i],
                "left": self._turns[left][i],
                "right": self._turns[right][i],
            }

    def vote(self, voter: str, *, revision: int, choice: str, seconds: float) -> Record:
        """Take the vote on the question that `state` showed; the next state."""
        with self._lock:
            state = self.state(voter)
            if state["revision"] != revision or "question" not in state:
                return self.state(voter, notice=OVERTAKEN)
            votes = last_votes(self._file.records)
            seat = next(s for s in self._seats(voter) if (voter, s.question_id) not in votes)
            self._write(voter, *seat, choice, seconds)
            return self.state(voter)

    def undo(self, voter: str, *, revision: int) -> Record:
        """Take back the voter's last vote that counts; the next state."""
        with self._lock:
            state = self.state(voter)
            if state["revision"] != revision or not state["can_undo"]:
                return self.state(voter, notice=OVERTAKEN)
            last = [v for (who, _), v in last_votes(self._file.records).items() if who == voter][-1]
            self._write(voter, last["question_id"], last["left"], last["right"], UNDONE, 0.0)
            return self.state(voter)

    def result(self, voter: str) -> Record:
        """The table of `tally`. The voter, who now knows the models, can change no vote after it.

        Raises ValueError while the voter has questions left.
        """
        with self._lock:
            if "question" in self.state(voter):
                raise ValueError("the result can be seen when all questions are voted on")
            self._unblinded.add(voter)
            votes = list(last_votes(self._file.records).values())
            table = tally(votes, self._models)
            return table | {"state": self.state(voter)}

    def _seats(self, voter: str) -> list[Seat]:
        return draw_seats(list(self._questions), self._models, voter=voter, seed=self._seed)

    def _write(
        self, voter: str, question_id: str, left: str, right: str, vote: str, seconds: float
    ) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        values = (question_id, left, right, vote, voter, seconds, now)
        self._file.append(dict(zip(KEYS, values, strict=True)))


class Refused(Exception):  # noqa: N818, it is an answer
    """A request that gets an HTTP status and a sentence instead of what it asks for."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class VoteServer(ThreadingHTTPServer):
    """Serves `poll` under an address that nobody can guess.

    The secret in it keeps out this machine's other users; it and the checks of Host and Origin keep
    out other web pages that the voter's browser has open.
    """

    def __init__(self, poll: Poll, *, host: str = "127.0.0.1", port: int = 0):
        self.poll = poll
        self.token = secrets.token_urlsafe(16)
        self.hosts = {host, "127.0.0.1", "localhost"}
        source = (resources.files("easylm_jax") / "vote.html.jinja").read_text(encoding="utf-8")
        self.page = jinja2.Environment(autoescape=True).from_string(source)
        super().__init__((host, port), _Handler)
        self.url = f"http://{host}:{self.server_port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: VoteServer
    timeout = 60  # seconds, of a connection that says nothing

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        nonce = secrets.token_urlsafe(16)
        try:
            body = self._read_body()  # whatever comes of it: unread, it would break the connection
            name, voter = self._check()
            if (self.command, name) == ("GET", ""):
                page = self.server.page.render(nonce=nonce)
                return self._send(200, page, "text/html", nonce)
            status, answer = 200, self._answer(name, voter, body)
        except Refused as refused:
            status, answer = refused.status, {"error": str(refused)}
        except OSError as error:  # of the file of votes
            status, answer = 500, {"error": f"The vote was not saved: {error}."}
        self._send(status, json.dumps(answer), "application/json", nonce)

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY:
            raise Refused(413, f"A request has at most {MAX_BODY} bytes.")
        return self.rfile.read(int(length))

    def _check(self) -> tuple[str, str]:
        """What is asked for and the voter, if the request comes from our own page."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.partition(":")[0] not in self.server.hosts:
            raise Refused(403, "This server has another name: open the address that it printed.")
        if origin not in (None, f"http://{host}"):
            raise Refused(403, "Another web page asked: open the address that the server printed.")
        url = urlsplit(self.path)
        token, _, name = url.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "This address is no longer valid: open the one the server printed.")
        return name, parse_qs(url.query).get("voter", [""])[0]

    def _answer(self, name: str, voter: str, body: bytes) -> Record:
        poll = self.server.poll
        try:
            if (self.command, name) == ("GET", "state"):
                return poll.state(spell(voter))
            if self.command != "POST" or name not in ("vote", "undo", "result"):
                raise Refused(404, "There is no such page.")
            if self.headers.get("Content-Type") != "application/json":
                raise Refused(415, "Expected JSON.")
            asked = json.loads(body)
            if name == "result":
                return poll.result(spell(voter))
            if name == "undo":
                return poll.undo(spell(voter), revision=asked["revision"])
            choice, seconds = asked["vote"], float(asked["seconds"])
            if choice not in CHOICES or not 0 <= seconds < math.inf:
                raise ValueError(f"a vote is one of {', '.join(CHOICES)}, after some seconds")
            return poll.vote(
                spell(voter), revision=asked["revision"], choice=choice, seconds=seconds
            )
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(400, f"Not done: {error}.") from error

    def _send(self, status: int, text: str, kind: str, nonce: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header(
            "Content-Security-Policy",
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        )
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")  # the address is a secret
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal keeps the address, and votes have their file."""


def read_questions(path: str) -> dict[str, list[str]]:
    """By id, of a task's data in FastChat's, Koala's, Self-Instruct's or AlpacaEval's layout, or of
    the samples that `evaluate` wrote."""
    questions = {}
    for number, (where, record) in enumerate(read_records([path], counts=Counter())):
        turns = record.get("turns") or record.get("request", {}).get("turns")
        if not turns:
            text = next((record[k] for k in ("prompt", "instruction", "text") if k in record), None)
            inputs = [instance["input"] for instance in record.get("instances", [])[:1]]
            turns = text and ["\n\n".join(filter(None, [text, *inputs]))]
        if not turns:
            raise ValueError(
                f"{where} holds no question: expected turns, prompt, instruction or text"
            )
        questions[str(record.get("question_id", record.get("id", number)))] = list(turns)
    return questions


def open_poll(answers: Sequence[str], questions: str, out: Path, *, seed: int = 0) -> Poll:
    """What the command line names, read and found to fit together."""
    if len(answers) != 2:
        raise ValueError(f"--answers names {len(answers)} files: expected two, --answers=A,B")
    a, b = (read_answers(path) for path in answers)
    if a.model == b.model:
        raise ValueError(
            f"{answers[0]} and {answers[1]} are both answers of {a.model}: name two models"
        )
    asked = read_questions(questions) if questions else a.questions | b.questions
    if not asked:
        raise ValueError(
            f"{answers[0]} and {answers[1]} do not say what was asked: name a file that does, such "
            "as --questions=OUT/samples/TASK.jsonl of evaluate"
        )
    a, b = (_by_question(each, asked) for each in (a, b))
    both = {i: turns for i, turns in asked.items() if i in a.turns and i in b.turns}
    if not both:
        among = f" of {questions}" if questions else ""
        raise ValueError(f"{answers[0]} and {answers[1]} answer no question{among} in common")
    return Poll(a, b, both, VoteFile(out, {a.model, b.model}), seed=seed)


def _by_question(answers: Answers, asked: Mapping[str, Sequence[str]]) -> Answers:
    """Under the questions' ids, also where the answers' file has none."""
    keys = {i: i if i in answers.turns else text_key(turns[0]) for i, turns in asked.items()}
    turns = {i: answers.turns[key] for i, key in keys.items() if key in answers.turns}
    return Answers(answers.model, turns)


def main(argv: list[str]) -> None:
    """The command line."""
    options = flags.FLAGS
    if len(argv) > 1:
        raise ValueError(f"arguments {argv[1:]} are not understood; write --answers=A,B")
    if options.votes or options.judgements:
        if not (options.votes and options.judgements):
            raise ValueError("--votes and --judgements need each other: name files of both")
        found = join(read_votes(options.votes), read_pair_judgements(options.judgements))
        print("\n\n".join(format_agreement(*item) for item in found.items()))
        return
    if not options.answers:
        raise ValueError("--answers is needed: two files of answers, --answers=A,B")
    if options.host in ("0.0.0.0", "::"):
        raise ValueError(
            f"--host={options.host} is the name of no machine: give the address that voters open"
        )
    out = Path(options.out)
    poll = open_poll(options.answers, options.questions, out, seed=options.seed)
    try:
        server = VoteServer(poll, host=options.host, port=options.port)
    except OSError as error:
        raise ValueError(
            f"--host={options.host} --port={options.port} cannot be served ({error.strerror}): "
            "name another port, or 0 for any that is free"
        ) from error
    how = "Ctrl-C ends; the same command goes on where each voter stopped."
    print(f"{poll.summary()}\nOpen {server.url}\n{how}", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    print(f"\n{poll.summary()}")


if __name__ == "__main__":
    flags.DEFINE_list("answers", None, "Two files of answers, FastChat's JSONL or AlpacaEval's.")
    flags.DEFINE_string(
        "questions",
        "",
        "What was asked: OUT/samples/TASK.jsonl of evaluate, or a task's data. Only AlpacaEval's "
        "layout of answers says it itself.",
    )
    flags.DEFINE_string("out", "votes.jsonl", "The votes; those that are there count.")
    flags.DEFINE_list("votes", [], "No page: compare these votes with --judgements.")
    flags.DEFINE_list("judgements", [], "Of the same answers, OUT/judgements/ of evaluate.")
    flags.DEFINE_string("host", "127.0.0.1", "Serve this address; default: to this machine alone.")
    flags.DEFINE_integer("port", 0, "0 takes any that is free.")
    flags.DEFINE_integer("seed", 0, "Of the order of questions and the seats.")
    run_main(main)
