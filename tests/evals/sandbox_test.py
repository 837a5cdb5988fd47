"""Programs do no harm and cannot pass by leaving early; the filter's numbers are the kernel's."""

import ctypes
import ctypes.util
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from easylm_jax.evals import sandbox
from easylm_jax.evals.confined import allowed_calls
from easylm_jax.evals.sandbox import Guards, run_program, run_programs
from experiments.code_sandbox import attacks

locked_in = pytest.mark.skipif(
    not sandbox.guards().seccomp, reason="this machine cannot hold programs back"
)
# This kernel, the first with Landlock, and one without. Seccomp is in all that are still in use.
KERNELS = [sandbox.guards(), Guards(landlock=1, seccomp=True), Guards(landlock=0, seccomp=True)]


@pytest.fixture
def prey(tmp_path):
    """What attacks aim at: a folder, a server and a process."""
    decoy = tmp_path / "decoy"
    decoy.mkdir()
    (decoy / "kept").write_text("kept")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim,
    ):
        yield decoy, server, victim
        victim.kill()


def run_attacks(found, prey, **limits):
    sources = [attacks.facts(*prey) + source for source in found.values()]
    return dict(zip(found, run_programs(sources, **limits), strict=True))


@locked_in
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_quick_attacks_fail_and_leave_no_trace(kernel, prey, monkeypatch):
    if kernel.landlock > sandbox.guards().landlock:
        pytest.skip("this kernel has no Landlock")
    monkeypatch.setattr(sandbox, "guards", lambda: kernel)
    monkeypatch.setenv("API_KEY", "secret")
    outcomes = run_attacks(attacks.QUICK, prey)
    succeeded = {name for name, outcome in outcomes.items() if outcome.status == "passed"}
    assert succeeded == (set() if kernel.landlock else set(attacks.READING))
    assert {outcome.status for outcome in outcomes.values()} <= {"failed", "passed"}
    assert not attacks.traces(*prey)


@locked_in
@pytest.mark.slow
def test_slow_attacks_are_stopped_and_leave_no_trace(prey):
    outcomes = run_attacks(attacks.SLOW, prey, timeout_s=1)
    disk = {"fill the disk", "fill the disk with small files"}
    for name, outcome in outcomes.items():
        assert outcome.status == ("failed" if name in disk else "timeout"), (name, outcome)
        assert not name.startswith("fill") or "on disk" in outcome.message
        assert outcome.seconds < 4 * sandbox.CLOCK_PER_CPU  # by a limit, on a busy machine too
    assert not attacks.traces(*prey)


@locked_in
def test_time_is_measured_by_the_processor(monkeypatch):
    monkeypatch.setattr(sandbox, "CLOCK_PER_CPU", 60)
    loops = [attacks.SLOW["endless loop that ignores signals"], "while True: pass"]
    outcomes = run_programs(["import signal\n" + loop for loop in loops], timeout_s=1)
    assert {(o.status, o.message) for o in outcomes} == {("timeout", "over 1 s of processor time")}


@locked_in
def test_what_is_harmless_works(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    modules = "re math collections heapq itertools bisect copy datetime json random typing sys"
    programs = [
        *(f"import {name}" for name in modules.split()),
        "open('x', 'w').write('abc')\nassert open('x').read() == 'abc'\nimport os\nos.remove('x')",
        "import tempfile\nwith tempfile.NamedTemporaryFile('w', dir='.') as f: f.write('x')",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert A(1).x == 1",
        "import signal\nsignal.alarm(9)\nassert len(bytearray(200 << 20))",
        "from contextlib import redirect_stdout\nimport os\n"
        "with redirect_stdout(open(os.devnull, 'w')): print('é')",
    ]
    outcomes = run_programs(programs)
    assert [outcome for outcome in outcomes if outcome.status != "passed"] == []
    assert not any(tmp_path.iterdir())  # the folders are gone


@locked_in
def test_outcomes_are_in_order_and_say_why():
    programs = ["assert False, 'first'", "1 / 0", "x = 1", "raise KeyError('z')", "def f(:"]
    outcomes = run_programs(programs)
    assert [o.message.partition("(")[0].strip() for o in outcomes] == [
        "AssertionError: first",
        "ZeroDivisionError: division by zero",
        "",
        "KeyError: 'z'",
        "SyntaxError: invalid syntax",
    ]


@locked_in
def test_the_order_of_sets_is_always_the_same():
    program = "raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    assert len({outcome.message for outcome in run_programs([program] * 4)}) == 1


@locked_in
def test_a_sandbox_that_does_not_start_is_no_failed_program():
    with pytest.raises(RuntimeError, match="did not start .*status 1.*: OverflowError"):
        run_program("pass", memory_mb=1 << 60)


def test_without_guards_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "guards", lambda: Guards(landlock=0, seccomp=False))
    mark = tmp_path / "ran"
    with pytest.raises(ValueError, match="needs Linux with seccomp .*, so use such a machine.$"):
        run_program(f"open({str(mark)!r}, 'w')")
    assert not mark.exists()


def test_protection_is_one_sentence(monkeypatch):
    said = set()
    for kernel in KERNELS:
        monkeypatch.setattr(sandbox, "guards", lambda kernel=kernel: kernel)
        said.add(sandbox.protection())
    assert len(said) == len({kernel.landlock for kernel in KERNELS})
    assert all(sentence.count(".") == 1 or "5.13" in sentence for sentence in said)


@pytest.mark.parametrize("machine, token", [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_numbers_of_system_calls_are_those_of_libseccomp(machine, token):
    library = ctypes.util.find_library("seccomp")
    if not library:
        pytest.skip("libseccomp is not installed")
    number_of = ctypes.CDLL(library).seccomp_syscall_resolve_name_arch
    number_of.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    calls = allowed_calls(machine, landlock=True)
    assert calls == {name: number_of(token, name.encode()) for name in calls}
    forbidden = {"fork", "clone", "clone3", "execve", "socket", "kill", "fcntl", "chmod"}
    assert not forbidden & calls.keys()


@locked_in
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_is_protected_as_root_is(prey):
    command = [sys.executable, "-c", _AS_NOBODY, attacks.facts(*prey)]
    try:
        done = subprocess.run(
            command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True,
            cwd=Path(__file__).parents[2], env={"PYTHONPATH": "."}, timeout=120,
        )  # fmt: skip
    except PermissionError:
        pytest.skip("this Python cannot be read by others")
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("this checkout cannot be read by others")
    assert (done.stdout, done.stderr) == ("['a file of its own']\n", "")
    assert not attacks.traces(*prey)


_AS_NOBODY = """
import sys
from easylm_jax.evals.sandbox import run_programs
from experiments.code_sandbox.attacks import QUICK
found = QUICK | {"a file of its own": "open('x', 'w').write('x')"}
outcomes = run_programs([sys.argv[1] + source for source in found.values()])
print([name for name, o in zip(found, outcomes) if o.status == "passed"])
"""
