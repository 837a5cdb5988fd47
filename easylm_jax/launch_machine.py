"""A Cloud TPU VM of one worker or many, or the request for it in the queue, by gcloud.

It is made, waited for, deleted, and runs scripts on its workers. What it is not: it knows nothing
of jobs. `launch.py` calls it.
"""

import dataclasses
import json
import re
import shlex
import subprocess
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from easylm_jax.launch_scripts import Answer, parse_answers, tagged

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


class Machine:
    """`itself` is the command line without the verb. A dry run prints commands and runs none."""

    def __init__(self, pod: Pod, *, itself: str, dry_run: bool = False):
        self._pod, self._itself, self._dry_run = pod, itself, dry_run

    def tell(self, sentence: str) -> None:
        if not self._dry_run:
            print(sentence, flush=True)

    def gcloud(self, *words: str, show: bool = False) -> str:
        argv = ["gcloud", *words]
        if self._dry_run:
            print(shlex.join(argv))
            return ""
        return run(argv, show=show)

    def tpus(self, *words: str, show: bool = False) -> str:
        where = (f"--project={self._pod.project}", f"--zone={self._pod.zone}", "--quiet")
        return self.gcloud("compute", "tpus", *words, *where, show=show)

    def _describe(self, kind: str) -> Any:
        """None: there is nothing of that name, or this is a dry run."""
        try:
            text = self.tpus(kind, "describe", self._pod.name, "--format=json")
        except GcloudError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise
        return json.loads(text) if text else None

    def state(self, *, suppose: str = "READY") -> State:
        """`suppose`: what a dry run goes on with."""
        if node := self._describe("tpu-vm"):
            return State(node["state"], len(node.get("networkEndpoints", ())))
        if self._dry_run:
            print(f"# if it is {suppose}:")
            return State(suppose)
        if self._pod.queued and (request := self._describe("queued-resources")):
            error = request["state"].get("failedData", {}).get("error", {})
            return State(request["state"]["state"], why=error.get("message", ""))
        return State("ABSENT")

    def ready(self) -> State:
        state = self.state()
        if state.name != "READY":
            raise ValueError(
                f"{self._pod.name} is {state}, not READY: `{self._itself} resume` makes it if "
                "need be, waits for it and starts the job"
            )
        return state

    def create(self) -> None:
        pod = self._pod
        options = [f"--accelerator-type={pod.accelerator_type}"]
        options += ["--spot"] * pod.spot
        options += [f"--service-account={pod.service_account}"] * bool(pod.service_account)
        options += [f"--network={pod.network}"] * bool(pod.network)
        if pod.queued:
            options += [f"--node-id={pod.name}", f"--runtime-version={pod.runtime_version}"]
            self.tpus("queued-resources", "create", pod.name, *options)
            self.tell(f"{pod.name} is in the queue, and costs money from when it is READY")
        else:
            self.tell(f"making {pod.name}, which takes minutes")
            options.append(f"--version={pod.runtime_version}")
            self.tpus("tpu-vm", "create", pod.name, *options)
            self.tell(f"{pod.name} is there, and costs money until `{self._itself} delete`")

    def delete(self) -> None:
        if self._pod.queued:
            self.tpus("queued-resources", "delete", self._pod.name, "--force")
        else:
            self.tpus("tpu-vm", "delete", self._pod.name)

    def settled(self, *, suppose: str = "READY") -> State:
        """Waits as long as the state is one that passes."""
        before = ""
        while (state := self.state(suppose=suppose)).name in PASSING:
            if state.name != before:
                self.tell(f"{self._pod.name} is {state}; waiting for what comes next")
            before = state.name
            time.sleep(POLL_S)
        return state

    def ssh(self, script: str, *, worker: str = "all", show: bool = False) -> str:
        """What `script` writes on workers, each line after its worker's number."""
        command = f"--command={tagged(script)}"
        words = ("tpu-vm", "ssh", self._pod.name, f"--worker={worker}", command)
        return self.tpus(*words, show=show)

    def on_all(self, state: State, script: str) -> dict[int, Answer]:
        try:
            output = self.ssh(script)
        except GcloudError as error:
            if not error.output:
                raise
            output = error.output  # of the workers that could be reached
        return parse_answers(output, state.num_workers)

    def demand(self, state: State, verb: str, script: str) -> dict[int, Answer]:
        """Raises ValueError naming the first worker on which `script` failed."""
        answers = self.on_all(state, script)
        for worker, answer in answers.items():
            if answer.status is None:
                raise ValueError(
                    f"{verb}: worker {worker} of {self._pod.name} does not answer: "
                    f"`{self._itself} check` tries again"
                )
            if answer.status:
                raise ValueError(
                    f"{verb} failed on worker {worker} of {self._pod.name} with status "
                    f"{answer.status}{': ' + answer.lines[-1] if answer.lines else ''}; "
                    f"`{self._itself} logs --worker={worker}` shows its log"
                )
        return answers
