"""What `launch.py` runs on the workers of a TPU VM: small bash scripts, and reading their answers.

A worker keeps everything in ~/easylm/NAME, here `home`:

    code/ venv/ uv/    the copied checkout, the environment, uv with its cache and its Python
    log                of every start, with time and commit, and of every setup
    lock               held by the job as long as it lives: neither a restarted machine nor another
                       process with its number is taken for it
    pid group status   of the job; its keeper; its exit status
    change.lock        held by copy, setup and start while they are at work

What it is not: it connects to nothing and runs nothing. Every function is pure.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Runs "$@" in the session that it leads, until that ends or `stop` ends it. It waits for its lock
# as long as somebody looks whether a job holds it.
KEEPER = """
exec 9> ../lock; flock -w 5 9 || exit
rm -f ../status; echo $$ > ../group
"$@" & echo $! > ../pid
wait $!; echo $? > ../status
echo "[ended with status $(cat ../status)]"
"""


class Answer(NamedTuple):
    """What a script wrote on a worker; status None: the worker did not answer."""

    status: int | None
    lines: list[str]


class Job(NamedTuple):
    state: str  # running, not started, ended with status N, killed, or does not answer
    last_line: str = ""
    last_rows: tuple[str, ...] = ()  # of metrics.jsonl, where that is on the worker


def _alone(home: str, if_job_runs: str) -> str:
    """What follows is the only one of its kind at work, and no job begins meanwhile."""
    return (
        f"mkdir -p {home} && cd {home} || exit; exec 8> change.lock; "
        "flock -w 600 8 || { echo another copy, setup or start is at work; exit 1; }; "
        f"test ! -e lock || flock -sn lock true || {{ {if_job_runs}; }}; "
    )


def copy_script(home: str, archive: str) -> str:
    """Replaces the code by what is in the archive, of which nothing is left."""
    return (
        f"trap 'rm -f ~/{archive}' EXIT; {_alone(home, 'echo the job uses the code; exit 1')}"
        f"set -e; rm -rf code.new; mkdir code.new; tar -xzf ~/{archive} -C code.new; "
        "rm -rf code; mv code.new code"
    )


def setup_script(home: str) -> str:
    """TPU VMs come with a Python that is too old; uv, in our folder, brings a newer one."""
    return (
        f"{_alone(home, 'echo the job uses the environment; exit 1')}"
        "set -e; exec >> log 2>&1; "
        "export UV_CACHE_DIR=$PWD/uv/cache UV_PYTHON_INSTALL_DIR=$PWD/uv/python; "
        "test -x uv/bin/uv || python3 -m pip install --quiet --no-cache-dir --target uv uv; "
        "test -x venv/bin/python || uv/bin/uv venv --quiet --python 3.12 venv; "
        "uv/bin/uv pip install --quiet --python venv/bin/python -e './code[tpu,gcs]'"
    )


def start_script(
    home: str, command: Sequence[str], *, environment: Mapping[str, str], version: str
) -> str:
    """Starts the job, and succeeds when it holds its lock; also when it did before."""
    exports = "".join(f"export {k}={shlex.quote(v)}; " for k, v in environment.items())
    argv = shlex.join(["bash", "-c", KEEPER, "easylm", *command])
    return (
        f"{_alone(home, 'exit 0')}"
        "test -x venv/bin/python && cd code || { echo run copy, then setup; exit 1; }; "
        f"rm -f ../pid; export PATH={home}/venv/bin:$PATH; {exports}"
        f'echo "[$(date -u +%FT%TZ) $(hostname) {version}]" >> ../log; '
        f"setsid {argv} >> ../log 2>&1 < /dev/null 8>&- & "
        f"for _ in $(seq 100); do test -s {home}/pid && exit; sleep 0.1; done; "
        "echo nothing has begun in 10 seconds; exit 1"
    )


def stop_script(home: str, grace_s: int) -> str:
    return (
        f"cd {home} 2> /dev/null || exit 0; test -e lock || exit 0; flock -sn lock true && exit; "
        f"kill -TERM $(cat pid); flock -w {grace_s} lock true && exit; "
        "kill -KILL -- -$(cat group); flock -w 10 lock true && echo killed"
    )


def check_script(home: str, workdir: str) -> str:
    """Writes lines: the job's state, the log's last line, the last two of the metrics."""
    rows = f"tail -n 2 {shlex.quote(workdir + '/metrics.jsonl')} 2> /dev/null; echo"
    return (
        f"cd {home} 2> /dev/null && test -e lock || {{ echo not started; exit 0; }}; "
        "if ! flock -sn lock true; then echo running; "
        'elif test -e status; then echo "ended with status $(cat status)"; '
        "else echo killed; fi; "
        "echo \"$(tail -c 4096 log | tr '\\r' '\\n' | grep -v '^ *$' | tail -n 1)\"; "
        f"{'true' if workdir.startswith('gs://') else rows}"
    )


def tagged(script: str) -> str:
    """Each line that `script` writes comes after `[worker] `, last `exit STATUS`.

    gcloud mixes the workers' lines, and its own status says little of theirs. A worker's number
    ends its host's name, t1v-n-0a1b2c3d-w-3.
    """
    return f'( ( {script} ); echo "exit $?" ) 2>&1 | sed -u "s/^/[${{HOSTNAME##*-w-}}] /"'


def parse_answers(output: str, num_workers: int) -> dict[int, Answer]:
    """The lines `[3] text` ... `[3] exit 0` of all workers, in any order, by worker."""
    answers = {worker: Answer(None, []) for worker in range(num_workers)}
    for number, text in re.findall(r"^\[(\d+)\] (.*)$", output, re.M):
        worker = int(number)
        status, lines = answers.get(worker, Answer(None, []))
        if ended := re.fullmatch(r"exit (\d+)", text):
            answers[worker] = Answer(int(ended[1]), lines)
        else:
            lines.append(text)
            answers[worker] = Answer(status, lines)
    return answers


def parse_jobs(answers: Mapping[int, Answer]) -> dict[int, Job]:
    """What `check_script` found, by worker."""
    return {
        worker: Job(*lines[:2], tuple(lines[2:])) if lines else Job("does not answer")
        for worker, (_, lines) in answers.items()
    }
