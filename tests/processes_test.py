"""How processes find one another, and what is left when one dies. Real ones, on loopback.

That a run goes on after that is train_multiprocess_test's.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from easylm_jax.processes import DistributedConfig, Processes, find_processes
from tests import command

PLAIN = {
    "JAX_COORDINATOR_ADDRESS": "node1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "gpu[017-018,020]",
    "SLURM_NTASKS": "24",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
HOST = re.escape(socket.gethostname())
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "JAX_PROCESS", "JAX_COORD", "JAX_NUM_PROC")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "environment, config, expected",
    [
        (PLAIN, {}, Processes("node1:1234", 4, 3)),
        (PLAIN | {"JAX_LOCAL_DEVICE_IDS": "0,2"}, {}, Processes("node1:1234", 4, 3, (0, 2))),
        (PLAIN, {"process_id": 0, "num_processes": 2}, Processes("node1:1234", 2, 0)),
        (SLURM, {}, Processes("gpu017:61440", 24, 9, (1,))),
        (SLURM, {"coordinator_address": "a:1"}, Processes("a:1", 24, 9, (1,))),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, {}, Processes("gpu017:61440", 24, 9, (0, 1))),
        (OPEN_MPI, {}, Processes("10.96.0.1:62624", 2, 1, (0,))),
    ],
)
def test_the_environment_tells_who_this_is(environment, config, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_processes(DistributedConfig(True, **config)) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not: start one process per GPU with srun"),
        (dict.fromkeys(PLAIN, ""), "JAX_COORDINATOR_ADDRESS, JAX_NUM_.*, JAX_PROCESS_ID are not"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two' in the environment; .* number"),
        ({"JAX_PROCESS_ID": "4"}, "process_id is 4, but num_processes = 4: it must be 0 to 3"),
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "coordinator_address is 'node1'; .* HOST:PORT"),
    ],
)
def test_a_half_set_environment_is_told_what_is_missing(changes, message, monkeypatch):
    for name, value in (PLAIN | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        find_processes(DistributedConfig(True))


PROGRAM = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from easylm_jax import processes
from easylm_jax.config import run_main
from easylm_jax.mesh import make_mesh

index, number, address, wait, fails = sys.argv[1:]
processes.GRACE_SECONDS = 1

def main(argv):
    config = processes.DistributedConfig(True, address, int(number), int(index), int(wait))
    with processes.joined_processes(config) as at_step:
        mesh = make_mesh(f"fsdp:-1@replica:{number}")
        print([[d.process_index for d in row] for row in mesh.devices[:, :, 0, 0]], flush=True)
        whole = NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
        x = jax.make_array_from_callback((mesh.size,), whole, lambda i: np.ones(mesh.size)[i])
        total = jax.jit(jnp.sum)
        for step in range(10**9):
            at_step(step)
            float(total(x))
            if step == 10:
                print("ready", flush=True)
                if index == fails:
                    raise OSError(28, "full")

sys.argv = sys.argv[:1]
run_main(main)
"""


def _start(number: int, who: tuple[int, ...], *, wait: int = 60, fails: int = -1):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), str(number), address, str(wait), str(fails)],
            **(dict(cwd=command.ROOT, env=environment) | pipes),
        )
        for i in who
    ]


def _read_until_ready(process: subprocess.Popen) -> list[str]:
    lines = []
    while not lines or "ready" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_when_one_is_killed_the_others_say_which_and_end(victim):
    """Process 0 is the one that jax's own service dies with."""
    processes = _start(3, (0, 1, 2))
    try:
        shown = [_read_until_ready(process) for process in processes]
        assert all("[[0, 0], [1, 1], [2, 2]]\n" in lines for lines in shown)  # replica x fsdp
        processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        survivors = [process for process in processes if process is not processes[victim]]
        errors = [command.finish(process, status=2)[1] for process in survivors]
        assert time.monotonic() - killed < 10  # milliseconds on an idle machine
        sentence = rf"error: process {victim} on host {HOST} died near "
        sentence += r"step [\d,]+: start the same command again on every host, or on another.*\n"
        assert all(re.fullmatch(sentence, error) for error in errors), errors
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("fails", [0, 1])
def test_when_one_fails_the_other_says_why_and_ends(fails):
    processes = _start(2, (0, 1), fails=fails)
    try:
        errors = [command.finish(process, status=2)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert errors[fails] == "error: [Errno 28] full\n"
    sentence = (
        rf"error: process {fails} on host {HOST} failed near step 1[01], .*\(\[Errno 28\] full"
    )
    assert re.match(sentence, errors[1 - fails]) and errors[1 - fails].count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "who, message",
    [
        ((0, 2), "of 3 processes, 1 did not come to .* in time (came: 0 from host H, 2 from "),
        ((1,), "process 1 on host H finds no process 0 at .* (Connection refused): start it"),
        ((0, 1, 1), "two processes say that they are process 1, on hosts .* and .*: give each "),
    ],
)
def test_when_one_never_comes_the_others_do_not_wait_for_ever(who, message):
    processes = _start(3, who, wait=4)
    try:
        errors = [command.finish(process, status=2)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    message = re.escape(message).replace(r"\.\*", ".*").replace(r"host\ H", f"host {HOST}")
    assert all(re.match(f"error: {message}.*\n$", error) for error in errors), errors
