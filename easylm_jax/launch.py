"""Run a job on a Cloud TPU VM or pod: `python -m easylm_jax.launch configs/launch/tpu.py VERB`

    list  create  delete         the machines; queued resources and spot as the file says
    copy  setup                  this checkout's tracked files, an environment, on all workers
    start  stop  resume          the job, detached, on all workers; after preemption `resume` alone
    check  logs                  what runs where; what it wrote

A verb is a few gcloud commands (launch_machine.py) and what they run on the workers, in bash
(launch_scripts.py); `--dry_run` prints them, quoted for a shell, and runs nothing. A worker keeps
everything in ~/easylm/NAME. No other file of the user's is written, here or there.

What it is not: a scheduler. Nothing runs here between two commands.
"""

import contextlib
import io
import json
import runpy
import shlex
import tarfile
import tempfile
from pathlib import Path

from absl import flags

from easylm_jax.config import from_config_dict, run_main
from easylm_jax.launch_machine import GONE, GcloudError, Machine, Pod, State, run
from easylm_jax.launch_scripts import (
    Job,
    check_script,
    copy_script,
    parse_jobs,
    setup_script,
    start_script,
    stop_script,
)
from easylm_jax.workdir import code_version

CHECKOUT = Path(__file__).parents[1]


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


class Launcher:
    """Each public method is a verb. `itself` is the command line without the verb."""

    def __init__(self, pod: Pod, *, itself: str, dry_run: bool = False):
        self.pod, self._itself, self._dry_run = pod, itself, dry_run
        self._machine = Machine(pod, itself=itself, dry_run=dry_run)
        self._tell = self._machine.tell
        self._home = f"~/easylm/{pod.name}"

    def list(self) -> None:
        self._machine.tpus("tpu-vm", "list", show=True)
        self._machine.tpus("queued-resources", "list", show=True)

    def create(self) -> None:
        state = self._machine.state(suppose="ABSENT")
        if state.name != "ABSENT":
            again = f"; `{self._itself} resume` makes it again" if state.name in GONE else ""
            self._tell(f"{self.pod.name} is there already, {state}: nothing is made{again}")
            return
        self._machine.create()

    def delete(self) -> None:
        if self._machine.state().name == "ABSENT":
            self._tell(f"there is no {self.pod.name}: nothing is deleted")
            return
        self._machine.delete()
        self._tell(f"{self.pod.name} is deleted; {self.pod.workdir} stays if it is elsewhere")

    def copy(self) -> None:
        """Tracked files as they are now in this checkout, committed or not."""
        state = self._machine.ready()
        names, untracked = tracked_files(CHECKOUT)
        packed = pack(CHECKOUT, names)
        with tempfile.TemporaryDirectory(prefix="easylm_") as folder:
            archive = f"{Path(folder).name}.tar.gz"
            Path(folder, archive).write_bytes(packed)
            if self._dry_run:
                print(f"# pack {len(names)} tracked files into {folder}/{archive}")
            there = f"{self.pod.name}:{archive}"
            self._machine.tpus("tpu-vm", "scp", f"{folder}/{archive}", there, "--worker=all")
            self._machine.demand(state, "copy", copy_script(self._home, archive))
        left = f"; not tracked and left out: {', '.join(untracked)}" if untracked else ""
        self._tell(f"{len(names)} files ({len(packed) / 1e6:.1f} MB) are on all workers{left}")

    def setup(self) -> None:
        self._machine.demand(self._machine.ready(), "setup", setup_script(self._home))
        self._tell("the environment is on all workers")

    def start(self) -> None:
        state = self._machine.ready()
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
        state = self._machine.state()
        if state.name != "READY":
            self._tell(f"{self.pod.name} is {state.name}: no job runs there")
            return
        answers = self._machine.demand(state, "stop", stop_script(self._home, grace_s))
        killed = [str(worker) for worker, answer in answers.items() if "killed" in answer.lines]
        how = f"; it had to be killed on workers {', '.join(killed)}" if killed else ""
        self._tell(f"the job has ended on all workers of {self.pod.name}{how}")

    def resume(self, grace_s: int = 600) -> None:
        """From any state to a running job, which goes on from its last checkpoint."""
        state = self._machine.settled(suppose="PREEMPTED")
        if state.name == "READY":
            states = set(self._job_states(state))
            if nothing_to_do := self._fares_well(states):
                self._tell(nothing_to_do)
                return
            # Alone a worker cannot save: it waits for the others, not for long here.
            self._machine.demand(state, "stop", stop_script(self._home, min(grace_s, 30)))
        elif state.name == "STOPPED":
            self._machine.tpus("tpu-vm", "start", self.pod.name)
        elif state.name in GONE | {"ABSENT"}:
            if state.name != "ABSENT":
                self._tell(f"{self.pod.name} is {state}: it is deleted and made again")
                self._machine.delete()
            self._machine.create()
        if (state := self._machine.settled()).name != "READY":
            raise ValueError(
                f"{self.pod.name} is {state}, not READY: mend that if it is yours to mend, then "
                f"`{self._itself} delete` and `{self._itself} resume`"
            )
        self.copy()
        self.setup()
        self._start(self._machine.ready())

    def check(self) -> None:
        """A line per worker. Raises ValueError naming the first whose job failed."""
        state = self._machine.state()
        self._tell(f"{self.pod.name}: {state}, workers: {state.num_workers}")
        if state.name != "READY":
            if state.name in GONE | {"ABSENT"}:
                self._tell(f"`{self._itself} resume` makes it again and goes on with the job")
            return
        jobs = parse_jobs(self._machine.on_all(state, check_script(self._home, self.pod.workdir)))
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
        self._machine.ready()
        lines = 20 if worker == "all" else 200
        script = f"tail -n {lines} {'-F ' * follow}{self._home}/log"
        with contextlib.suppress(KeyboardInterrupt):
            self._machine.ssh(script, worker=worker, show=True)

    # ---- how ----

    def _start(self, state: State) -> None:
        pod = self.pod
        pod.check_workers(state.num_workers)
        version = " ".join(f"{key} {value}" for key, value in code_version().items())
        script = start_script(self._home, pod.command, environment=pod.environment, version=version)
        self._machine.demand(state, "start", script)
        self._tell(
            f"the job runs on all workers of {self.pod.name}: `{self._itself} logs --follow` shows "
            "what it writes"
        )

    def _job_states(self, state: State) -> tuple[str, ...]:
        """Of all workers. Raises ValueError if one does not answer, for it may run the job."""
        answers = self._machine.demand(state, "check", check_script(self._home, self.pod.workdir))
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
                f"the job on {self.pod.name} is ending, some workers are done: nothing to resume; "
                f"`{self._itself} stop` ends it if it hangs"
            )
        return ""

    def _last_step(self, jobs: dict[int, Job]) -> str:
        if self.pod.workdir.startswith("gs://"):
            file = f"{self.pod.workdir}/metrics.jsonl"
            try:
                rows = self._machine.gcloud("storage", "cat", "--range=-65536", file).splitlines()
            except GcloudError:
                rows = []
        else:
            rows = [row for job in jobs.values() for row in job.last_rows]
        for row in reversed(rows):
            with contextlib.suppress(json.JSONDecodeError):  # half written, or cut by the range
                return str(json.loads(row)["step"])
        return "none that can be read"


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
