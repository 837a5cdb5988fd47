"""Several processes that train as one: who they are, how they meet, how they end together.

`jax.distributed` connects them, but aborts with a stack trace when one never comes, and when one
dies it leaves the others waiting for minutes. So every process also keeps one TCP connection to
process 0, from before jax starts to the end of the run. Process 0 listens at the coordinator's
address; jax's own service gets a free port beside it. A process that is killed closes its
connections, a host that loses power stops answering: the others learn of both, say one sentence
that names it, and end with status 2. What it is not: restarting, which is the launcher's.

Called by `train.py` alone.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` asks

KEEPALIVE = {  # a host that answers none of 5 probes in 60 s is gone
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 5,
}
GRACE_SECONDS = 10  # when one fails, the others may be about to say the same sentence
HOLD_SECONDS = 15  # see `_hold_connections`
SERVICE_SECONDS = 30  # for jax's service to listen, milliseconds after all have come
LONGEST_LINE = 1 << 20  # bytes; the names of 16,000 hosts


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Of several processes. What is None comes from the environment, see `find_processes`."""

    initialize: bool = False
    coordinator_address: str | None = None  # host:port of process 0
    num_processes: int | None = None
    process_id: int | None = None
    wait_seconds: int = 300  # for all processes to come


@dataclasses.dataclass(frozen=True)
class Processes:
    """Where process 0 listens, how many there are, which one this is and its devices."""

    address: str
    number: int
    index: int
    local_device_ids: tuple[int, ...] | None = None  # None: all of the host


def find_processes(config: DistributedConfig) -> Processes:
    """From the config, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or else what
    jax finds by itself: Slurm, Open MPI, Cloud TPU (also on GKE), Kubernetes.

    Raises:
      ValueError: that does not tell everything.
    """
    given = {
        "JAX_COORDINATOR_ADDRESS": config.coordinator_address,
        "JAX_NUM_PROCESSES": config.num_processes,
        "JAX_PROCESS_ID": config.process_id,
    }
    for name, value in given.items():
        text = os.environ.get(name)
        if value is None and text:
            if name != "JAX_COORDINATOR_ADDRESS" and not text.isdecimal():
                raise ValueError(f"{name} is {text!r} in the environment; it must be a number")
            given[name] = text if name == "JAX_COORDINATOR_ADDRESS" else int(text)
    text = os.environ.get("JAX_LOCAL_DEVICE_IDS", "")
    ids = [i.strip() for i in text.split(",") if i] or None
    if ids and not all(i.isdecimal() for i in ids):
        raise ValueError(
            f"JAX_LOCAL_DEVICE_IDS is {text!r} in the environment; it must be numbers with commas "
            "between, such as 0,1"
        )
    ids = ids and [int(i) for i in ids]
    if None in given.values():
        try:
            *found, ids = ClusterEnv.auto_detect_unset_distributed_params(
                *given.values(), ids, None, config.wait_seconds
            )
        except RuntimeError as error:  # Kubernetes without rights, Open MPI 5 without mpi4py
            raise ValueError(f"the launcher's settings cannot be read: {error}") from error
        given = dict(zip(given, found, strict=True))
    if missing := [name for name, value in given.items() if value is None]:
        raise ValueError(
            f"distributed.initialize is set, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: start one process per GPU with srun or "
            "mpirun, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID on every host"
        )
    address, number, index = given.values()
    if number < 1:
        raise ValueError(f"num_processes is {number}; it must be 1 or more")
    if not (0 <= index < number):
        raise ValueError(
            f"process_id is {index}, but num_processes = {number}: it must be 0 to {number - 1}"
        )
    if not address.rpartition(":")[2].isdecimal() or ":" not in address:
        raise ValueError(f"coordinator_address is {address!r}; it must be HOST:PORT of process 0")
    return Processes(address, number, index, tuple(ids) if ids else None)


@contextlib.contextmanager
def joined_processes(config: DistributedConfig) -> Iterator[Callable[[int], None]]:
    """Join the others, and inside the context watch them. Before anything touches a device.

    Gives `at_step(step)`, for the sentence. When a process dies inside the context, this one ends;
    when one leaves it by an exception, the others end `GRACE_SECONDS` later, if not before.
    """
    if not config.initialize:
        yield lambda step: None
        return
    processes = find_processes(config)
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    meet = _gather if processes.index == 0 else _connect
    peers, port = meet(processes, time.monotonic() + config.wait_seconds)
    before = _open_sockets()
    peers.watch()
    try:
        _start_jax(processes, port)
        if processes.index == 0 and processes.number > 1:
            peers.holder = _hold_connections(_open_sockets() - before)
        yield peers.at_step
    except BaseException as error:
        peers.leave(error)
        raise
    peers.leave(None)


def _start_jax(processes: Processes, port: int) -> None:
    """Connect all by jax's own service, which process 0 starts at `port` of its host.

    Raises:
      ValueError: it cannot listen there, or cannot be reached.
    """
    host = processes.address.rpartition(":")[0]
    try:
        if processes.index > 0:  # where jax finds no service, it aborts with a stack trace
            _reach(host, port, time.monotonic() + SERVICE_SECONDS).close()
        jax.distributed.initialize(
            coordinator_address=f"{host}:{port}",
            num_processes=processes.number,
            process_id=processes.index,
            local_device_ids=processes.local_device_ids,
            cluster_detection_method="deactivate",
        )
    except (OSError, jax.errors.JaxRuntimeError) as error:
        why = str(getattr(error, "strerror", None) or error).partition("\n")[0]
        raise ValueError(
            f"process {processes.index} on host {socket.gethostname()} cannot use jax's own "
            f"service at {host}:{port} ({why}): it takes a free port of process 0's host beside "
            f"{processes.address}, so open all TCP ports between the hosts of the run, and "
            "start again"
        ) from error


class _Link:
    """Lines of JSON over one connection."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._heard = b""

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the other has gone: its link tells
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float | None = None) -> dict[str, Any] | None:
        """The next message; None when the other has gone, or says what we do not speak."""
        try:
            while b"\n" not in self._heard:
                self._connection.settimeout(deadline and deadline - time.monotonic())
                more = self._connection.recv(1 << 16)
                if not more or len(self._heard) > LONGEST_LINE:
                    return None
                self._heard += more
            line, _, self._heard = self._heard.partition(b"\n")
            message = json.loads(line)
        except (OSError, ValueError, RecursionError):  # ValueError also when the time is over
            return None
        return message if isinstance(message, dict) else None

    def is_closed(self) -> bool:
        """Whether the other, which is to say nothing now, has gone."""
        self._connection.settimeout(0)
        try:
            return self._connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self._connection.settimeout(None)

    def close(self) -> None:
        self._connection.close()


class _Peers:
    """The other processes, as this one sees them. Process 0 has a link to all, the others to it."""

    holder: subprocess.Popen | None = None

    def __init__(self, processes: Processes, links: dict[int, _Link], hosts: list[str]):
        self._me, self._links, self._hosts = processes.index, links, hosts
        self._step: int | None = None
        self._left: set[int] = set()  # ended, and said so
        self._all_leave = True  # none ends from a thread, without telling jax
        self._changed = threading.Condition()
        self._watching = True

    def at_step(self, step: int) -> None:
        self._step = step

    def watch(self) -> None:
        for process in self._links:
            threading.Thread(target=self._hear, args=(process,), daemon=True).start()

    def leave(self, error: BaseException | None) -> None:
        """Tell the others, and after an error wait for them, who may end for the same reason.

        Or the error is of a connection to one that died: then this waits for the sentence.
        """
        why = str(error).strip().partition("\n")[0] or type(error).__name__ if error else None
        self._tell(process=self._me, why=why)
        with self._changed:
            self._left.add(self._me)
            if error:
                self._changed.wait_for(
                    lambda: len(self._left) == len(self._hosts), timeout=GRACE_SECONDS + 2
                )
                if not self._all_leave or len(self._left) < len(self._hosts):
                    # jax would wait for the others in vain, and abort.
                    atexit.register(_exit_now, 2 if isinstance(error, ValueError | OSError) else 1)
            self._watching = False
        if self.holder:
            self.holder.kill()
            self.holder.wait()

    def _hear(self, process: int) -> None:
        while message := self._links[process].receive():
            self._learn(message)
        if process not in self._left:
            self._learn({"process": process, "died": True})

    def _learn(self, message: dict[str, Any]) -> None:
        """A process left, for the reason `why` if any; or it `died`; or its thread `ended` it.

        Process 0 passes on what it hears.
        """
        if self._me == 0:
            self._tell(**message)
        process, why = message["process"], message.get("why")
        with self._changed:
            self._left.add(process)
            self._all_leave &= "ended" not in message
            self._changed.notify_all()
            if not self._watching:
                return
            near = "before the first step" if self._step is None else f"near step {self._step:,}"
            who = f"process {process} on host {self._hosts[process]}"
            again = "start the same command again on every host"
            if "died" in message:
                _end_now(
                    f"{who} died {near}: {again}, or on another number of hosts "
                    "(distributed.num_processes), and the run goes on after its last checkpoint"
                )
            if why and self._me not in self._left:
                sentence = f"{who} failed {near}, so this one ends ({why}): mend that, then {again}"
                timer = threading.Timer(GRACE_SECONDS, self._end_too, [sentence])
                timer.daemon = True
                timer.start()

    def _end_too(self, sentence: str) -> None:
        if self._watching and self._me not in self._left:
            self._tell(process=self._me, ended=True)
            _end_now(sentence)

    def _tell(self, **message: Any) -> None:
        for process, link in self._links.items():
            if process != message["process"]:
                link.send(**message)


def _gather(processes: Processes, deadline: float) -> tuple[_Peers, int]:
    """Of process 0: wait until all have come, then tell them who they are and jax's port."""
    address, number = processes.address, processes.number
    try:
        port = int(address.rpartition(":")[2])
        both = dict(family=socket.AF_INET6, dualstack_ipv6=True)
        how = both if socket.has_dualstack_ipv6() else {}
        server = socket.create_server(("", port), backlog=number, **how)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at {address} ({error.strerror}): another run may be there; "
            "choose another port in coordinator_address"
        ) from error
    links, hosts = {}, {0: socket.gethostname()}
    with server:
        while len(hosts) < number:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                link = _Link(server.accept()[0])
            except TimeoutError:
                _refuse(links, _absent(processes, hosts))
            hello = link.receive(min(deadline, time.monotonic() + 5))
            if not _is_hello(hello):  # a port scanner
                link.close()
                continue
            index, host = hello["process"], hello["host"]
            if hello["number"] != number:
                _refuse(
                    links | {index: link},
                    f"process {index} on host {host} says that there are {hello['number']} "
                    f"processes, process 0 on host {hosts[0]} that there are {number}: give all "
                    "the same num_processes",
                )
            if index in links and links[index].is_closed():  # it died here, and was started again
                links.pop(index).close()
            if index in links:
                _refuse(
                    links | {-1: link},
                    f"two processes say that they are process {index}, on hosts {hosts[index]} and "
                    f"{host}: give each its own process_id",
                )
            links[index], hosts[index] = link, host
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    names = [hosts[i] for i in range(number)]
    for link in links.values():
        link.send(port=port, hosts=names)
    return _Peers(processes, links, names), port


def _is_hello(message: dict[str, Any] | None) -> bool:
    match message:
        case {"process": int(index), "host": str(), "number": int(number)}:
            return index is not True and 0 < index < number
    return False


def _absent(processes: Processes, hosts: dict[int, str]) -> str:
    absent = [str(i) for i in range(processes.number) if i not in hosts]
    came = ", ".join(f"{i} from host {host}" for i, host in sorted(hosts.items()))
    return (
        f"of {processes.number} processes, {', '.join(absent[:10])}"
        f"{f' and {len(absent) - 10} more' if len(absent) > 10 else ''} did not come to "
        f"{processes.address} in time (came: {came}): start the same command on every host, or set "
        "distributed.wait_seconds higher"
    )


def _refuse(links: dict[int, _Link], sentence: str) -> NoReturn:
    for link in links.values():
        link.send(refused=sentence)
    raise ValueError(sentence)


def _connect(processes: Processes, deadline: float) -> tuple[_Peers, int]:
    """Of the other processes: find process 0, and wait with it for the rest."""
    host, _, port = processes.address.rpartition(":")
    try:
        link = _Link(_reach(host, int(port), deadline))
    except OSError as error:
        raise ValueError(
            f"process {processes.index} on host {socket.gethostname()} finds no process 0 "
            f"at {processes.address} ({error.strerror or error}): start it there, and see "
            "that a firewall lets the port through"
        ) from error
    link.send(process=processes.index, host=socket.gethostname(), number=processes.number)
    answer = link.receive(deadline + GRACE_SECONDS) or {
        "refused": f"process 0 at {processes.address} ended before all had come: see what it says"
    }
    if "refused" in answer:
        raise ValueError(answer["refused"])
    return _Peers(processes, {0: link}, answer["hosts"]), answer["port"]


def _reach(host: str, port: int, deadline: float) -> socket.socket:
    """A connection, tried until the deadline."""
    while True:
        try:
            return socket.create_connection((host.strip("[]"), port), timeout=5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _open_sockets() -> set[int]:
    """File descriptors of connections, not of listening; none where there is no /proc."""
    found, folder = set(), "/proc/self/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(OSError):
            if os.readlink(f"{folder}/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as opened:
                    if not opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        found.add(int(name))
    return found


def _hold_connections(connections: set[int]) -> subprocess.Popen:
    """Keep jax's connections to process 0 open for a moment after its death.

    jax aborts the others, with a stack trace, as soon as these close. A child that has them too
    outlives this process by `HOLD_SECONDS`, in which the others say their sentence and end. It dies
    too when the whole host goes, or all of its cgroup (a container, a Slurm step that is killed):
    then jax may add its stack trace to the sentence.
    """
    return subprocess.Popen(
        ["sh", "-c", f"cat; sleep {HOLD_SECONDS}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=tuple(connections),
        start_new_session=True,
    )


def _end_now(sentence: str) -> NoReturn:
    """From a thread: the main one may wait for ever for the process that died."""
    sys.stderr.write(f"error: {sentence}\n")  # in one piece: several may write
    _exit_now(2)


def _exit_now(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
