"""Run a job on a Cloud TPU VM or pod: `python -m easylm_jax.launch configs/launch/tpu.py VERB`

    list  create  delete         the machines; queued resources and spot as the file says
    copy  setup                  this checkout's tracked files, an environment, on all workers
    start  stop  resume          the job, detached, on all workers; after preemption `resume` alone
    check  logs                  what runs where; what it wrote

A verb is a few gcloud commands; `--dry_run` prints them, quoted for a shell, and runs nothing. A
worker keeps everything in ~/easylm/NAME (launch_scripts.py). No other file of the user's is
written, here or there.

What it is not: a scheduler. Nothing runs here between two commands.
"""

import contextlib
import dataclasses
import io
import json
import re
import runpy
import shlex
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from easylm_jax.config import from_config_dict, run_main
from easylm_jax.launch_scripts import (
    Answer,
    Job,
    check_script,
    copy_script,
    parse_answers,
    parse_jobs,
    setup_script,
    start_script,
    stop_script,
    tagged,
)
from easylm_jax.workdir import code_version

CHECKOUT = Path(__file__).parents[1]
POLL_S = 30  # seconds between two looks at a machine that is being made
# States of TPU VMs and of queued resources: those that end by themselves, and those of a machine
# that has to be made again.
PASSING = {"CREATING", "STARTING", "RESTARTING", "REPAIRING", "REIMAGING", "STOPPING", "DELETING"}
PASSING |= {"ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "SUSPENDING"}
GONE = {"PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED"}


@dataclasses.dataclass(frozen=True)
class Pod:
    """A TPU VM, of one worker or many, and the job it is for."""

    name: str
    project: str
    zone: str
    accelerator_type: str  # such as v5p-128
    runtime_version: str  # what is installed on it
    command: tuple[str, ...]  # the job; runs in the copied checkout, `python` is the environment's
    workdir: str  # of the run; gs://, or an absolute path where there is one worker
    spot: bool = False  # cheaper, and taken away when somebody else wants it
    queued: bool = False  # wait in line, instead of failing when there is none
    service_account: str = ""  # empty: the project's default
    network: str = ""  # empty: the project's default
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the job

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?", self.name):
            raise ValueError(
                f"name = {self.name!r} cannot be the name of a TPU VM: use small letters, digits "
                "and hyphens, a letter first"
            )
        if bad := [key for key in self.environment if not re.fullmatch(r"[A-Za-z_]\w*", key)]:
            raise ValueError(f"environment: {bad[0]!r} cannot be the name of a variable")
        if not self.workdir.startswith(("gs://", "/")):
            raise ValueError(
                f"workdir = {self.workdir!r} would lie in the copied checkout, which every copy "
                "replaces: write gs://BUCKET/..., or for one worker an absolute path"
            )
        for word in self.command:
            if word.startswith("--workdir=") and word != f"--workdir={self.workdir}":
                raise ValueError(f"command has {word}, but workdir = {self.workdir!r}: write one")

    def check_workers(self, num_workers: int) -> None:
        """Raises ValueError when training cannot work on so many."""
        if num_workers < 2 or "easylm_jax.train" not in self.command:
            return
        if not self.workdir.startswith("gs://"):
            raise ValueError(
                f"workdir = {self.workdir!r}, but {self.name} has {num_workers} workers, each of "
                "which writes its part of a checkpoint: use gs://BUCKET/..."
            )
        if not any("distributed.initialize" in word for word in self.command):
            raise ValueError(
                f"{self.name} has {num_workers} workers, which would not find one another: add "
                "--config.distributed.initialize=True to command"
            )


class GcloudError(ValueError):
    """A failure of gcloud in one sentence; `output` is what it wrote to standard output."""

    output = ""


class State(NamedTuple):
    name: str  # gcloud's word; ABSENT: there is nothing of that name
    num_workers: int = 0
    why: str = ""  # a queued resource failed

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


# ---- pure parts ----


def tracked_files(checkout: Path) -> tuple[list[str], list[str]]:
    """What git tracks and is there, and what is neither tracked nor ignored."""
    lists = []
    for which in (["--cached"], ["--others", "--exclude-standard"]):
        argv = ["git", "-C", str(checkout), "ls-files", "-z", *which]
        names = run(argv).split("\0")
        lists.append(sorted({name for name in names if name and (checkout / name).is_file()}))
    return lists[0], lists[1]


def pack(checkout: Path, names: list[str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in names:
            archive.add(checkout / name, arcname=name)
    return packed.getvalue()


def run(argv: list[str], *, show: bool = False) -> str:
    """The only place that starts a process. `show` lets its output through as it comes."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=None if show else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise ValueError(
            f"{argv[0]} is not on PATH: install it (https://cloud.google.com/sdk/docs/install for "
            "gcloud), then run this again"
        ) from None
    if done.returncode == 0:
        return done.stdout or ""
    if re.search(r"gcloud auth login|active account selected", done.stderr):
        raise GcloudError("gcloud is not logged in: run `gcloud auth login`, then this again")
    said = re.findall(r"^ERROR: (.*)", done.stderr, re.M) or done.stderr.split("\n")[-2:-1]
    error = GcloudError(f"`{shlex.join(argv[:6])} ...` failed: {''.join(said[:1]) or 'silently'}")
    error.output = done.stdout or ""
    raise error


# ---- the verbs ----


class Launcher:
    """Each public method is a verb. `itself` is the command line without the verb."""

    def __init__(self, pod: Pod, *, itself: str, dry_run: bool = False):
        self.pod, self._itself, self._dry_run = pod, itself, dry_run
        self._home = f"~/easylm/{pod.name}"

    def list(self) -> None:
        self._tpus("tpu-vm", "list", show=True)
        self._tpus("queued-resources", "list", show=True)

    def create(self) -> None:
        state = self._state(suppose="ABSENT")
        if state.name != "ABSENT":
            again = f"; `{self._itself} resume` makes it again" if state.name in GONE else ""
            self._tell(f"{self.pod.name} is there already, {state}: nothing is made{again}")
            return
        self._create()

    def delete(self) -> None:
        if self._state().name == "ABSENT":
            self._tell(f"there is no {self.pod.name}: nothing is deleted")
            return
        self._delete()
        self._tell(f"{self.pod.name} is deleted; {self.pod.workdir} stays if it is elsewhere")

    def copy(self) -> None:
        """Tracked files as they are now in this checkout, committed or not."""
        state = self._ready()
        names, untracked = tracked_files(CHECKOUT)
        packed = pack(CHECKOUT, names)
        with tempfile.TemporaryDirectory(prefix="easylm_") as folder:
            archive = f"{Path(folder).name}.tar.gz"
            Path(folder, archive).write_bytes(packed)
            if self._dry_run:
                print(f"# pack {len(names)} tracked files into {folder}/{archive}")
            there = f"{self.pod.name}:{archive}"
            self._tpus("tpu-vm", "scp", f"{folder}/{archive}", there, "--worker=all")
            self._demand(state, "copy", copy_script(self._home, archive))
        left = f"; not tracked and left out: {', '.join(untracked)}" if untracked else ""
        self._tell(f"{len(names)} files ({len(packed) / 1e6:.1f} MB) are on all workers{left}")

    def setup(self) -> None:
        self._demand(self._ready(), "setup", setup_script(self._home))
        self._tell("the environment is on all workers")

    def start(self) -> None:
        state = self._ready()
        states = self._job_states(state)
        num_running = states.count("running")
        if num_running and num_running == len(states):
            self._tell(f"{self.pod.name} runs the job already, on all its workers: not started")
            return
        if num_running:
            raise ValueError(
                f"{self.pod.name} runs the job on {num_running} of {len(states)} workers only: "
                f"`{self._itself} stop` ends it there"
            )
        self._start(state)

    def stop(self, grace_s: int = 600) -> None:
        """SIGTERM, upon which training saves and ends; SIGKILL to what lives `grace_s` later."""
        state = self._state()
        if state.name != "READY":
            self._tell(f"{self.pod.name} is {state.name}: no job runs there")
            return
        answers = self._demand(state, "stop", stop_script(self._home, grace_s))
        killed = [str(worker) for worker, answer in answers.items() if "killed" in answer.lines]
        how = f"; it had to be killed on workers {', '.join(killed)}" if killed else ""
        self._tell(f"the job has ended on all workers of {self.pod.name}{how}")

    def resume(self, grace_s: int = 600) -> None:
        """From any state to a running job, which goes on from its last checkpoint."""
        state = self._settled(suppose="PREEMPTED")
        if state.name == "READY":
            states = set(self._job_states(state))
            if nothing_to_do := self._fares_well(states):
                self._tell(nothing_to_do)
                return
            # Alone a worker cannot save: it waits for the others, not for long here.
            self._demand(state, "stop", stop_script(self._home, min(grace_s, 30)))
        elif state.name == "STOPPED":
            self._tpus("tpu-vm", "start", self.pod.name)
        elif state.name in GONE | {"ABSENT"}:
            if state.name != "ABSENT":
                self._tell(f"{self.pod.name} is {state}: it is deleted and made again")
                self._delete()
            self._create()
        if (state := self._settled()).name != "READY":
            raise ValueError(
                f"{self.pod.name} is {state}, not READY: mend that if it is yours to mend, then "
                f"`{self._itself} delete` and `{self._itself} resume`"
            )
        self.copy()
        self.setup()
        self._start(self._ready())

    def check(self) -> None:
        """A line per worker. Raises ValueError naming the first whose job failed."""
        state = self._state()
        self._tell(f"{self.pod.name}: {state}, workers: {state.num_workers}")
        if state.name != "READY":
            if state.name in GONE | {"ABSENT"}:
                self._tell(f"`{self._itself} resume` makes it again and goes on with the job")
            return
        jobs = parse_jobs(self._on_all(state, check_script(self._home, self.pod.workdir)))
        self._tell(f"last step in {self.pod.workdir}: {self._last_step(jobs)}")
        for worker, job in jobs.items():
            self._tell(f"worker {worker}: {job.state}; {job.last_line}")
        for worker, job in jobs.items():
            if job.state not in ("running", "not started", "ended with status 0"):
                raise ValueError(
                    f"the job on worker {worker} of {self.pod.name}: {job.state}; "
                    f"`{self._itself} logs --worker={worker}` shows why, "
                    f"`{self._itself} resume` starts it again everywhere"
                )

    def logs(self, worker: str = "all", follow: bool = False) -> None:
        self._ready()
        lines = 20 if worker == "all" else 200
        script = f"tail -n {lines} {'-F ' * follow}{self._home}/log"
        with contextlib.suppress(KeyboardInterrupt):
            self._ssh(script, worker=worker, show=True)

    # ---- how ----

    def _tell(self, sentence: str) -> None:
        if not self._dry_run:
            print(sentence, flush=True)

    def _gcloud(self, *words: str, show: bool = False) -> str:
        argv = ["gcloud", *words]
        if self._dry_run:
            print(shlex.join(argv))
            return ""
        return run(argv, show=show)

    def _tpus(self, *words: str, show: bool = False) -> str:
        where = (f"--project={self.pod.project}", f"--zone={self.pod.zone}", "--quiet")
        return self._gcloud("compute", "tpus", *words, *where, show=show)

    def _describe(self, kind: str) -> Any:
        """None: there is nothing of that name, or this is a dry run."""
        try:
            text = self._tpus(kind, "describe", self.pod.name, "--format=json")
        except GcloudError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise
        return json.loads(text) if text else None

    def _state(self, *, suppose: str = "READY") -> State:
        """`suppose`: what a dry run goes on with."""
        if node := self._describe("tpu-vm"):
            return State(node["state"], len(node.get("networkEndpoints", ())))
        if self._dry_run:
            print(f"# if it is {suppose}:")
            return State(suppose)
        if self.pod.queued and (request := self._describe("queued-resources")):
            error = request["state"].get("failedData", {}).get("error", {})
            return State(request["state"]["state"], why=error.get("message", ""))
        return State("ABSENT")

    def _ready(self) -> State:
        state = self._state()
        if state.name != "READY":
            raise ValueError(
                f"{self.pod.name} is {state}, not READY: `{self._itself} resume` makes it if "
                "need be, waits for it and starts the job"
            )
        return state

    def _create(self) -> None:
        pod = self.pod
        options = [f"--accelerator-type={pod.accelerator_type}"]
        options += ["--spot"] * pod.spot
        options += [f"--service-account={pod.service_account}"] * bool(pod.service_account)
        options += [f"--network={pod.network}"] * bool(pod.network)
        if pod.queued:
            options += [f"--node-id={pod.name}", f"--runtime-version={pod.runtime_version}"]
            self._tpus("queued-resources", "create", pod.name, *options)
            self._tell(f"{pod.name} is in the queue, and costs money from when it is READY")
        else:
            self._tell(f"making {pod.name}, which takes minutes")
            options.append(f"--version={pod.runtime_version}")
            self._tpus("tpu-vm", "create", pod.name, *options)
            self._tell(f"{pod.name} is there, and costs money until `{self._itself} delete`")

    def _delete(self) -> None:
        if self.pod.queued:
            self._tpus("queued-resources", "delete", self.pod.name, "--force")
        else:
            self._tpus("tpu-vm", "delete", self.pod.name)

    def _settled(self, *, suppose: str = "READY") -> State:
        """Waits as long as the state is one that passes."""
        before = ""
        while (state := self._state(suppose=suppose)).name in PASSING:
            if state.name != before:
                self._tell(f"{self.pod.name} is {state}; waiting for what comes next")
            before = state.name
            time.sleep(POLL_S)
        return state

    def _ssh(self, script: str, *, worker: str = "all", show: bool = False) -> str:
        """What `script` writes on workers, each line after its worker's number."""
        command = f"--command={tagged(script)}"
        words = ("tpu-vm", "ssh", self.pod.name, f"--worker={worker}", command)
        return self._tpus(*words, show=show)

    def _on_all(self, state: State, script: str) -> dict[int, Answer]:
        try:
            output = self._ssh(script)
        except GcloudError as error:
            if not error.output:
                raise
            output = error.output  # of the workers that could be reached
        return parse_answers(output, state.num_workers)

    def _demand(self, state: State, verb: str, script: str) -> dict[int, Answer]:
        """Raises ValueError naming the first worker on which `script` failed."""
        answers = self._on_all(state, script)
        for worker, answer in answers.items():
            if answer.status is None:
                raise ValueError(
                    f"{verb}: worker {worker} of {self.pod.name} does not answer: "
                    f"`{self._itself} check` tries again"
                )
            if answer.status:
                raise ValueError(
                    f"{verb} failed on worker {worker} of {self.pod.name} with status "
                    f"{answer.status}{': ' + answer.lines[-1] if answer.lines else ''}; "
                    f"`{self._itself} logs --worker={worker}` shows its log"
                )
        return answers

    def _start(self, state: State) -> None:
        pod = self.pod
        pod.check_workers(state.num_workers)
        version = " ".join(f"{key} {value}" for key, value in code_version().items())
        script = start_script(self._home, pod.command, environment=pod.environment, version=version)
        self._demand(state, "start", script)
        self._tell(
            f"the job runs on all workers of {self.pod.name}: `{self._itself} logs --follow` shows "
            "what it writes"
        )

    def _job_states(self, state: State) -> tuple[str, ...]:
        """Of all workers. Raises ValueError if one does not answer, for it may run the job."""
        answers = self._demand(state, "check", check_script(self._home, self.pod.workdir))
        return tuple(job.state for job in parse_jobs(answers).values())

    def _fares_well(self, states: set[str]) -> str:
        """Why a job in these states is not to be resumed; empty: it is."""
        if states == {"running"}:
            return f"{self.pod.name} runs the job on all its workers: nothing to resume"
        if states == {"ended with status 0"}:
            return (
                f"the job ended well on all workers of {self.pod.name}: `{self._itself} start` "
                f"starts it again, `{self._itself} delete` ends the cost"
            )
        if states == {"running", "ended with status 0"}:
            return (
                f"the job on {self.pod.name} is ending, on some workers it has: nothing to resume; "
                f"`{self._itself} stop` ends it if it hangs"
            )
        return ""

    def _last_step(self, jobs: dict[int, Job]) -> str:
        if self.pod.workdir.startswith("gs://"):
            file = f"{self.pod.workdir}/metrics.jsonl"
            try:
                rows = self._gcloud("storage", "cat", "--range=-65536", file).splitlines()
            except GcloudError:
                rows = []
        else:
            rows = [row for job in jobs.values() for row in job.last_rows]
        for row in reversed(rows):
            with contextlib.suppress(json.JSONDecodeError):  # half written, or cut by the range
                return str(json.loads(row)["step"])
        return "none that can be read"


# ---- the command line ----


def load_pod(file: str) -> Pod:
    """The Pod that `get_config()` of a Python file returns."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}: copy configs/launch/tpu.py and name it here")
    try:
        module = runpy.run_path(file, run_name="pod_config")
    except SyntaxError as error:
        raise ValueError(
            f"{error.filename}, line {error.lineno}, is not Python: {error.msg}"
        ) from None
    if "get_config" not in module:
        raise ValueError(f"{file} has no get_config(): copy configs/launch/tpu.py, which has one")
    return from_config_dict(Pod, module["get_config"]())


def main(argv: list[str]) -> None:
    """The command line."""
    options = flags.FLAGS
    verbs = [name for name in vars(Launcher) if not name.startswith("_")]
    if len(argv) != 3 or argv[2] not in verbs:
        raise ValueError(
            f"write `python -m easylm_jax.launch FILE VERB` with one of {' '.join(verbs)}, not "
            f"{shlex.join(argv[1:]) or 'nothing'}"
        )
    file, verb = argv[1:]
    itself = f"python -m easylm_jax.launch {shlex.quote(file)}"
    launcher = Launcher(load_pod(file), itself=itself, dry_run=options.dry_run)
    arguments = {
        "stop": {"grace_s": options.grace_s},
        "resume": {"grace_s": options.grace_s},
        "logs": {"worker": options.worker, "follow": options.follow},
    }
    try:
        getattr(launcher, verb)(**arguments.get(verb, {}))
    except KeyboardInterrupt:
        raise ValueError(
            f"interrupted: what was asked for goes on there, a request stays in the queue; "
            f"`{itself} check` shows it, `{itself} {verb}` goes on here"
        ) from None


if __name__ == "__main__":
    flags.DEFINE_boolean("dry_run", False, "Print the commands, quoted for a shell; run nothing.")
    flags.DEFINE_string("worker", "all", "logs: the number of one worker, or all.")
    flags.DEFINE_boolean("follow", False, "logs: go on until Ctrl-C.")
    flags.DEFINE_integer("grace_s", 600, "stop: seconds from SIGTERM to SIGKILL.")
    flags.FLAGS.set_gnu_getopt(True)  # flags may come after the verb
    run_main(main)
