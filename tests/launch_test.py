"""Pods against a fake gcloud (tests/fake_gcloud) that really runs what is sent to each worker."""

import contextlib
import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from easylm_jax import launch, launch_machine
from easylm_jax.config import from_config_dict
from easylm_jax.launch_scripts import check_script, copy_script, start_script, stop_script
from easylm_jax.plan import case_of, make_plan
from easylm_jax.planner.topology import parse_topology
from easylm_jax.train import TrainConfig

ROOT = Path(__file__).parents[1]
FAKE = ROOT / "tests" / "fake_gcloud"
PATIENCE_S = 20
NASTY = ("it's", 'a "b"', "$HOME `id` $(id)", "a;b|c&d>e", "*\\ ~ #!", "two\nlines", "", "é %s")

# Counts steps in workdir/metrics.jsonl (worker 0), goes on from workdir/saved, saves upon SIGTERM.
JOB = """
import json, os, pathlib, signal, sys, time
workdir, how = pathlib.Path(sys.argv[1]), sys.argv[2]
me = os.environ["HOSTNAME"][-1]
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(how != "deaf"))
workdir.mkdir(parents=True, exist_ok=True)
(workdir / f"got{me}").write_text(json.dumps([sys.argv[3:], dict(os.environ), os.getcwd()]))
saved = workdir / f"saved{me}"
step = int(saved.read_text()) if saved.exists() else 0
print("going on from step", step, flush=True)
while True:
    step += 1
    if me == "0":
        with open(workdir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step}) + "\\n")
    print("step", step, end="\\r", flush=True)
    if asked and asked[-1]:
        saved.write_text(str(step))
        sys.exit(0)
    if how == "broken" and me == "1":
        sys.exit("there is no such file")
    time.sleep(0.02)
"""


class World:
    """The fake cloud of one test, and the checkout that is copied."""

    def __init__(self, folder: Path, **pod):
        self.folder, self.workdir = folder, folder / "run"
        self.checkout = folder / "checkout"
        self.checkout.mkdir()
        for name, text in {"job.py": JOB, "setup.py": "", "gone.py": ""}.items():
            (self.checkout / name).write_text(text)
        for argv in (["init", "--quiet"], ["add", "."]):
            subprocess.run(["git", "-C", self.checkout, *argv], check=True)
        (self.checkout / "gone.py").unlink()
        (self.checkout / "mine.py").write_text("")
        self.change(nodes={}, queue={}, python=sys.executable)
        how = pod.pop("how", "obedient")
        command = ("python", "job.py", str(self.workdir), how, *NASTY)
        standard = dict(name="pod-1", project="p", zone="z", accelerator_type="v5p-16")
        standard |= dict(runtime_version="v2-alpha-tpuv5", workdir=str(self.workdir))
        self.pod = launch.Pod(**standard | {"command": command} | pod)

    def change(self, **entries) -> None:
        file = self.folder / "state.json"
        now = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(now | entries))

    def home(self, worker: int) -> Path:
        return self.folder / "homes" / f"pod-1-{worker}"

    def pid(self, worker: int, name: str = "pid") -> int:
        return int((self.home(worker) / "easylm" / "pod-1" / name).read_text())

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []

    def step(self) -> int:
        file = self.workdir / "metrics.jsonl"
        return json.loads(file.read_text().splitlines()[-1])["step"] if file.exists() else 0

    def kill(self, *names: str) -> None:
        for file in self.folder.glob("homes/*/easylm/pod-1/group"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(file.read_text()), signal.SIGKILL)


def until(condition) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = []

    def make(**pod):
        made.append(World(tmp_path, **pod))
        monkeypatch.setattr(launch, "CHECKOUT", made[0].checkout)
        return made[0]

    monkeypatch.setattr(launch_machine, "POLL_S", 0.01)
    version = {"commit": "0a1b2c3", "dirty": False}  # the checkout's may change meanwhile
    monkeypatch.setattr(launch, "code_version", lambda: version)
    monkeypatch.setenv("FAKE_GCLOUD", str(tmp_path))
    # The fake starts 300 times: by the Python of the tests, which needs no search for one.
    path = f"{FAKE}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    yield make
    for one in made:
        one.kill()


def launcher(world: World, **options) -> launch.Launcher:
    return launch.Launcher(world.pod, itself="LAUNCH", **options)


@pytest.mark.slow
def test_from_creation_to_the_end(world, capfd):
    world = world(environment={"NASTY_VALUE": "".join(NASTY)})
    pod = launcher(world)

    def said() -> str:
        return capfd.readouterr().out

    pod.create()
    pod.copy()
    assert "2 files" in (text := said()) and "left out: mine.py" in text
    with pytest.raises(ValueError, match="start failed on worker 0 .* run copy, then setup"):
        pod.start()
    pod.setup()
    pod.start()
    until(lambda: world.step() > 3)
    pod.check()
    assert re.search(r"last step in .*: \d+\n.*worker 0: running; step \d+\n", text := said())
    assert "worker 1: running; step" in text and "READY, workers: 2" in text
    before = world.calls()
    pod.start()
    assert (
        "runs the job already" in said() and world.pid(0) and len(world.calls()) == 2 + len(before)
    )
    for worker in (0, 1):  # what was asked for is what runs
        argv, environment, cwd = json.loads((world.workdir / f"got{worker}").read_text())
        assert argv == [*NASTY] and environment["NASTY_VALUE"] == "".join(NASTY)
        assert Path(cwd) == world.home(worker) / "easylm/pod-1/code"
        assert {p.name for p in Path(cwd).iterdir()} == {"job.py", "setup.py"}
    for verb, what in {"copy": "code", "setup": "environment"}.items():
        with pytest.raises(
            ValueError, match=f"{verb} failed on worker 0 .*the job uses the {what}"
        ):
            getattr(pod, verb)()
    assert all([p.name for p in world.home(i).iterdir()] == ["easylm"] for i in (0, 1))

    world.change(unreachable=[1])  # which is no reason to end what runs well
    for verb in (pod.resume, pod.start):
        with pytest.raises(ValueError, match="check: worker 1 of pod-1 does not answer"):
            verb()
    world.change(unreachable=[])
    pod.resume()
    assert "nothing to resume" in said()
    assert not [*world.workdir.glob("saved*")]

    os.kill(world.pid(1), signal.SIGKILL)
    until(lambda: (world.home(1) / "easylm/pod-1/status").exists())
    with pytest.raises(ValueError) as caught:
        pod.check()
    assert "worker 1 of pod-1: ended with status 137" in str(caught.value)
    assert "`LAUNCH logs --worker=1`" in str(caught.value)
    pod.logs("1")
    assert "[1] going on from step 0" in (text := said()) and "[0] going" not in text
    assert re.search(r"\[1\] \[20\S+Z \S+ commit 0a1b2c3 dirty False\]\n", text)
    with pytest.raises(ValueError, match="on 1 of 2 workers only: `LAUNCH stop`"):
        pod.start()

    (world.workdir / "got1").unlink()
    pod.resume()
    saved = int((world.workdir / "saved0").read_text())  # worker 0 was asked to end, and saved
    assert saved > 3 and not (world.workdir / "saved1").exists()
    until(lambda: world.step() > saved)
    until((world.workdir / "got1").exists)
    os.kill(world.pid(1), signal.SIGTERM)
    until(lambda: (world.home(1) / "easylm/pod-1/status").exists())
    pod.resume()  # worker 0 may still write
    assert "the job on pod-1 is ending" in said()
    step = world.step()
    until(lambda: world.step() > step)
    pod.stop()
    assert "ended on all workers" in (text := said()) and "killed" not in text
    assert int((world.workdir / "saved0").read_text()) > saved
    pod.resume()
    assert "the job ended well on all workers of pod-1: `LAUNCH start`" in said()
    pod.check()
    assert said().count("ended with status 0") == 4
    pod.delete()
    pod.delete()
    assert "there is no pod-1" in said()


@pytest.mark.slow
def test_a_spot_pod_is_waited_for_preempted_and_made_again(world, capfd):
    world = world(spot=True, queued=True, service_account="a@b", network="net")
    pod = launcher(world)
    pod.create()
    pod.create()
    assert "is there already, WAITING_FOR_RESOURCES: nothing is made\n" in capfd.readouterr().out
    with pytest.raises(ValueError, match="PROVISIONING, not READY: `LAUNCH resume`"):
        pod.start()
    pod.resume()
    until(lambda: world.step() > 3)
    pod.stop()
    pod.start()
    saved = world.step()
    until(lambda: world.step() > saved)

    world.kill()
    shutil.rmtree(world.folder / "homes")
    world.change(nodes={}, queue={"pod-1": {"next": ["SUSPENDED"] * 3 + [""]}})
    capfd.readouterr()
    pod.check()
    assert "SUSPENDED" in (text := capfd.readouterr().out) and "`LAUNCH resume`" in text
    pod.create()
    assert "nothing is made; `LAUNCH resume` makes it again" in capfd.readouterr().out
    before = len(world.calls())
    pod.resume()
    until(lambda: world.step() >= saved)
    assert "going on from step 0" not in (world.home(0) / "easylm/pod-1/log").read_text()
    assert "WAITING_FOR_RESOURCES; waiting for" in capfd.readouterr().out
    made = [call for call in world.calls()[before:] if call[2] == "queued-resources"]
    assert [call[3] for call in made][:3] == ["describe", "delete", "create"]
    assert "--force" in made[1]
    expected = {"--spot", "--node-id=pod-1", "--accelerator-type=v5p-16", "--network=net"}
    expected |= {"--service-account=a@b", "--runtime-version=v2-alpha-tpuv5"}
    assert expected <= {*made[2]}


def test_a_job_that_does_not_heed_is_killed(world, capfd):
    world = world(how="deaf", accelerator_type="v5p-8")
    pod = launcher(world)
    for verb in (pod.create, pod.copy, pod.setup, pod.start):
        verb()
    until(lambda: world.step() > 1)
    pod.stop(grace_s=1)
    assert "killed on workers 0\n" in capfd.readouterr().out
    step = world.step()
    with open(world.workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 12')
    with pytest.raises(ValueError, match="worker 0 of pod-1: killed"):
        pod.check()
    assert f"last step in {world.workdir}: {step}\n" in capfd.readouterr().out
    (world.workdir / "metrics.jsonl").write_text(json.dumps({"step": step}))
    time.sleep(0.2)
    assert world.step() == step


@pytest.mark.slow
def test_which_worker_failed(world, capfd):
    world = world(how="broken", workdir="gs://bucket/run")
    pod = launcher(world)
    for verb in (pod.create, pod.copy):
        verb()
    (world.home(1) / "broken").touch()
    with pytest.raises(ValueError, match="setup failed on worker 1 of pod-1 with status 28"):
        pod.setup()
    pod.logs("1")
    assert "[1] no space left on device" in capfd.readouterr().out
    (world.home(1) / "broken").unlink()
    pod.setup()
    pod.start()
    until(lambda: (world.home(1) / "easylm/pod-1/status").exists())
    with pytest.raises(ValueError, match="worker 1 of pod-1: ended with status 1;"):
        pod.check()
    assert "none that can be read" in (text := capfd.readouterr().out)
    assert "worker 1: ended with status 1; [ended with status 1]" in text
    bucket = world.folder / "buckets/bucket/run"
    bucket.mkdir(parents=True)
    rows = [json.dumps({"step": step, "loss": "x" * 100}) for step in range(2000)]
    (bucket / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step"')
    world.change(unreachable=[1])
    with pytest.raises(ValueError, match="worker 1 of pod-1: does not answer"):
        pod.check()
    assert "last step in gs://bucket/run: 1999\n" in capfd.readouterr().out
    with pytest.raises(ValueError, match="stop: worker 1 of pod-1 does not answer"):
        pod.stop()


@pytest.mark.slow
@pytest.mark.parametrize("queued", [False, True])
def test_a_dry_run_prints_what_is_run_and_runs_nothing(world, capfd, queued):
    world = world(queued=queued)
    dry = launcher(world, dry_run=True)
    verbs = ("list", "create", "copy", "setup", "start", "check", "stop", "resume", "delete")
    printed = {}
    for verb in verbs:
        getattr(dry, verb)()
        printed[verb] = shell_lines(capfd.readouterr().out)
    assert world.calls() == [] and not world.home(0).exists()
    real = launcher(world)
    for verb in ("list", "create", "resume", "check", "stop", "setup", "start", "delete"):
        before = len(world.calls())
        getattr(real, verb)()
        done = [["gcloud", *call] for call in world.calls()[before:]]
        if verb in ("resume", "create") and queued:  # looks until it is there
            done = [call for call in done if "describe" not in call]
            printed[verb] = [call for call in printed[verb] if "describe" not in call]
        if verb == "resume":  # the archive has another name; it was not there before
            done, printed[verb] = (
                [
                    [re.sub(r"[\w/]*easylm_\w+\.tar\.gz", "A", word) for word in call]
                    for call in calls
                    if call[4] not in ("describe", "delete", "create")
                ]
                for calls in (done, printed[verb])
            )
            done = [c for c in done if "running" not in " ".join(c) and "kill" not in " ".join(c)]
        assert done == printed[verb], verb


def shell_lines(text: str) -> list[list[str]]:
    """Commands as a shell would take them apart; quoted newlines belong to their word."""
    words = shlex.split(text, comments=True)
    starts = [i for i, word in enumerate(words) if word == "gcloud"] + [len(words)]
    return [words[a:b] for a, b in zip(starts, starts[1:], strict=False)]


def command_line(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "easylm_jax.launch", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)


FITS = {
    "configs/launch/tpu.py": {"v5p:4x4x4": "easylm_jax.train"},
    "docs/launch_tpu.md": {"v5p:4x4x4": "easylm_jax.plan --config=configs/llama_p"},
    "docs/launch_gpu.md": {"h100:8": "--workdir=runs/7b", "h100:8@4": "--workdir=/shared/runs/7b"},
}


@pytest.mark.parametrize("file", FITS)
def test_what_is_shipped_fits_into_memory(file):
    for topology, words in FITS[file].items():
        text = (ROOT / file).read_text().split(words)[1].split("\n\n")[0]
        given = dict(re.findall(r"--config\.(mesh|micro_batches)=([^\s`\"]+)", text))
        config = runpy.run_path(str(ROOT / "configs/llama_pretrain.py"))["get_config"]("7b")
        case = case_of(from_config_dict(TrainConfig, config))
        given["micro_batches"] = int(given.get("micro_batches", case.micro_batches))
        plan = make_plan(
            dataclasses.replace(case, **given), parse_topology(topology), compiles=False
        )
        assert plan.fits, (topology, given)


def test_of_two_starts_one_begins_and_nothing_replaces_its_code(tmp_path):
    """As gcloud repeats a script whose connection broke."""

    def begin(script: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True)

    home = tmp_path / "home"
    (home / "venv/bin").mkdir(parents=True)
    (home / "venv/bin/python").symlink_to(sys.executable)
    (home / "code").mkdir()
    start = start_script(str(home), ["sleep", "60"], environment={}, version="")
    both = [begin(start), begin(start)]
    try:
        assert [one.wait() for one in both] == [0, 0]
        pid = int((home / "pid").read_text())
        assert Path(f"/proc/{pid}/cmdline").read_text() == "sleep\x0060\x00"
        assert len((home / "log").read_text().splitlines()) == 1
        refused = begin(copy_script(str(home), "there_is_none"))
        assert (refused.wait(), refused.stdout.read()) == (1, "the job uses the code\n")
        looks = [begin(check_script(str(home), "gs://")) for _ in range(3)]
        assert [look.communicate()[0].split("\n")[0] for look in looks] == ["running"] * 3
    finally:
        begin(stop_script(str(home), 5)).wait()
    looks = [begin(check_script(str(home), "gs://")) for _ in range(3)]
    expected = ["ended with status 143"] * 3
    assert [look.communicate()[0].split("\n")[0] for look in looks] == expected


QUOTA = {"state": "FAILED", "failedData": {"error": {"message": "Quota limit exceeded"}}}


@pytest.mark.parametrize(
    "nodes, queue, expected",
    [
        (["STOPPED"], [], "tpu-vm start"),
        (["STOPPING", "STOPPED"], [], "tpu-vm start"),
        (["REIMAGING", "READY"], [], "tpu-vm ssh"),
        (["DELETING"], [], "queued-resources create"),
        ([], [QUOTA], "queued-resources delete, queued-resources create"),
        (["HIDDEN"], [], "pod-1 is HIDDEN, not READY"),
    ],
)
def test_resume_from_rare_states(world, monkeypatch, capfd, nodes, queue, expected):
    world = world(queued=True)
    ready = {"state": "READY", "networkEndpoints": [{}]}
    if nodes:
        first, *later = nodes
        world.change(nodes={"pod-1": ready | {"state": first, "next": later}})
    if queue:
        world.change(queue={"pod-1": {"next": [*queue, ""]}})
    for verb in ("copy", "setup", "_start"):
        monkeypatch.setattr(launch.Launcher, verb, lambda *_: None)
    if "not READY" in expected:
        with pytest.raises(ValueError, match=expected):
            launcher(world).resume()
        return
    launcher(world).resume()
    done = [" ".join(call[2:4]) for call in world.calls() if call[3] != "describe"]
    assert ", ".join(done).startswith(expected)
    assert "Quota limit exceeded" in capfd.readouterr().out or not queue


def test_why_a_request_failed_is_said_and_it_is_not_made_again_at_once(world, monkeypatch):
    world = world(queued=True)
    monkeypatch.setattr(launch_machine.Machine, "create", lambda self: None)  # it fails once more
    world.change(queue={"pod-1": {"next": [QUOTA, QUOTA, ""]}})
    monkeypatch.setattr(launch_machine.Machine, "delete", lambda self: None)
    with pytest.raises(ValueError, match=r"FAILED \(Quota limit exceeded\), not READY"):
        launcher(world).resume()


def test_a_pod_that_could_not_save_or_find_itself_is_refused(world):
    pod = world().pod
    for workdir in ("runs/debug", "~/runs/debug"):
        with pytest.raises(ValueError, match="workdir = .* in the copied checkout"):
            dataclasses.replace(pod, workdir=workdir)
    train = ("python", "-m", "easylm_jax.train", "--config=configs/debug.py")
    with pytest.raises(ValueError, match="command has --workdir=runs/debug, but workdir = "):
        dataclasses.replace(pod, command=(*train, "--workdir=runs/debug"))
    pod = dataclasses.replace(pod, command=train)
    pod.check_workers(1)
    with pytest.raises(ValueError, match="has 16 workers, each of which writes its part"):
        launch.Launcher(pod, itself="LAUNCH")._start(launch_machine.State("READY", 16))
    pod = dataclasses.replace(pod, workdir="gs://bucket/run")
    with pytest.raises(ValueError, match="add --config.distributed.initialize=True to command"):
        pod.check_workers(16)
    initialize = "--config.distributed.initialize=True"
    dataclasses.replace(pod, command=(*train, initialize)).check_workers(16)


def test_a_file_that_is_no_pod_is_said_in_one_sentence(world, tmp_path, monkeypatch):
    for name, text in {
        "readme.txt": "Read me!",
        "no.py": "",
        "bad.py": "\ndef get_config(:",
    }.items():
        (tmp_path / name).write_text(text)
    for name, expected in {
        "readme.txt": "readme.txt, line 1, is not Python",
        "no.py": r"no.py has no get_config\(\)",
        "bad.py": "bad.py, line 2, is not Python",
    }.items():
        with pytest.raises(ValueError, match=expected):
            launch.load_pod(str(tmp_path / name))


def test_an_interrupted_wait_says_what_goes_on(world, monkeypatch):
    world()

    def interrupt(seconds):
        raise KeyboardInterrupt

    given = dict(dry_run=False, grace_s=1, worker="all", follow=False)
    monkeypatch.setattr(launch, "flags", SimpleNamespace(FLAGS=SimpleNamespace(**given)))
    monkeypatch.setattr(launch_machine, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(ValueError, match="a request stays in the queue; .* check` shows it"):
        launch.main(["launch", str(ROOT / "configs/launch/tpu.py"), "resume"])


def test_what_is_wrong_is_said_in_one_sentence(world, tmp_path):
    world()
    config = "configs/launch/tpu.py"
    (tmp_path / "wrong.py").write_text(
        (ROOT / config).read_text().replace('name="llama-7b"', 'name="LLaMA 7B"')
    )
    cases = [
        ((), {}, "one of list create delete copy setup start stop resume check logs, not nothing"),
        ((config, "launch"), {}, "not configs/launch/tpu.py launch"),
        (("none.py", "list"), {}, "there is no file none.py"),
        ((str(tmp_path / "wrong.py"), "list"), {}, "name = 'LLaMA 7B' cannot be the name"),
        ((config, "check"), {"PATH": str(tmp_path)}, "gcloud is not on PATH: install it"),
    ]
    for arguments, environment, expected in cases:
        done = command_line(*arguments, **environment)
        assert done.returncode == 2 and expected in done.stderr, (arguments, done.stderr)
        assert done.stderr.count("\n") == 1 and done.stdout == ""
    file = tmp_path / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"logged_out": True}))
    done = command_line(config, "check")
    assert done.returncode == 2
    assert (
        done.stderr == "error: gcloud is not logged in: run `gcloud auth login`, then this again\n"
    )
    done = command_line(config, "create", "--dry_run")  # a flag after the verb
    assert done.returncode == 0 and done.stdout.count("gcloud compute tpus") == 2, done.stderr
