"""How processes find one another, and what is left when one dies. Real ones, on loopback.

That a run goes on after that is train_multiprocess_test's.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from easylm_jax import processes as package
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
        ({"JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"}, "num_processes is 0; .* be 1 or more"),
        ({"JAX_LOCAL_DEVICE_IDS": "0,a"}, "JAX_LOCAL_DEVICE_IDS is '0,a' .* such as 0,1"),
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "coordinator_address is 'node1'; .* HOST:PORT"),
    ],
)
def test_a_half_set_environment_is_told_what_is_missing(changes, message, monkeypatch):
    for name, value in (PLAIN | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        find_processes(DistributedConfig(True))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _gather(number: int, clients):
    """`clients(connect)` in a thread while process 0 waits; what process 0 learns of the hosts."""
    processes = Processes(f"127.0.0.1:{_free_port()}", number, 0)
    opened = []

    def connect(said: bytes) -> socket.socket:
        port = int(processes.address.rpartition(":")[2])
        opened.append(package._reach("127.0.0.1", port, time.monotonic() + 10))
        opened[-1].sendall(said)
        return opened[-1]

    thread = threading.Thread(target=clients, args=(connect,))
    thread.start()
    try:
        return package._gather(processes, time.monotonic() + 10)[0]._hosts
    finally:
        thread.join()
        for connection in opened:
            connection.close()


def _hello(process, number, host="h") -> bytes:
    return json.dumps({"process": process, "number": number, "host": host}).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b"5\n",
        b'{"process": 1}\n',
        _hello([1], 3),
        _hello(True, 3),
        _hello(0, 3),
        _hello(-1, 3),
        _hello(9, 3),
        _hello(1, 3, host=5),
        _hello(1, "3"),
        b"\xff\x00\x16\x03\n",
        b"[" * 100_000 + b"\n",
        b"x" * (16 << 20),  # no end: refused before it is all sent
    ],
    ids=lambda line: repr(line[:40]),
)
def test_who_says_something_odd_is_sent_away_and_the_others_meet(line):
    ended = []

    def clients(connect):
        try:
            odd = connect(line)
            odd.settimeout(3)
            ended.append(odd.recv(1) == b"")
        except (ConnectionError, TimeoutError) as error:
            ended.append(isinstance(error, ConnectionError))
        for process in (1, 2):
            connect(_hello(process, 3, f"host{process}"))

    assert _gather(3, clients) == [socket.gethostname(), "host1", "host2"]
    assert ended == [True]


def test_a_line_that_trickles_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        link = package._Link(server.accept()[0])
    over = threading.Event()

    def trickle():
        while not over.wait(0.05):
            sender.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    threading.Timer(2, over.set).start()
    assert link.receive(time.monotonic() + 0.2) is None
    assert not over.is_set()
    over.set()
    thread.join()
    link.close()
    sender.close()


def test_one_that_died_while_it_waited_may_come_again():
    def clients(connect):
        connect(_hello(1, 3, "before")).close()
        connect(_hello(1, 3, "after"))
        connect(_hello(2, 3, "other"))

    assert _gather(3, clients) == [socket.gethostname(), "after", "other"]


def test_two_living_ones_with_one_number_are_refused():
    with pytest.raises(ValueError, match="two processes say .* process 1, on hosts a and b"):
        _gather(3, lambda connect: [connect(_hello(1, 3, host)) for host in "ab"])


def test_another_number_of_processes_is_told():
    with pytest.raises(ValueError, match="process 4 on host h says that there are 5 .* are 3"):
        _gather(3, lambda connect: connect(_hello(4, 5)))


def test_where_jaxs_own_port_is_closed_one_sentence_says_what_to_open(monkeypatch):
    monkeypatch.setattr(package, "SERVICE_SECONDS", 0.1)
    monkeypatch.setattr(package.jax.distributed, "initialize", lambda **_: pytest.fail("aborts"))
    port = _free_port()
    message = rf"process 1 on host {HOST} cannot use jax's own service at 127.0.0.1:{port} "
    message += (
        r"\(Connection refused\): .* port of process 0's host beside 127.0.0.1:1, so open all"
    )
    with pytest.raises(ValueError, match=message):
        package._start_jax(Processes("127.0.0.1:1", 2, 1), port)


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
