"""Runs Python programs that nobody has read, such as a model's answers. Called by code.py.

    run_program("assert 1 + 1 == 2") -> Outcome(status="passed", message="", seconds=0.04)

Every program is a new Python process that locks itself in before the program starts: confined.py
says with what. This side gives it nothing (an empty environment, no input, no output, a fresh
folder), watches the clock and the disk, kills it, and removes the folder. A program has passed when
it ran to its end; leaving early with status 0 is a failure, since a secret is handed out only then.

That secret guards against accidents, not against deceit: tests run inside the program's own process
and a program that sets out to fake their result can.
"""

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from easylm_jax.evals.confined import has_seccomp, landlock_version

MAX_DISK_BYTES = 64 << 20
MAX_FILES = 1000
CLOCK_PER_CPU = 4  # how much longer than its processor time a program may take by the clock
_TICK_S = 0.1
_DISK = f"{MAX_DISK_BYTES >> 20} MiB or {MAX_FILES:,} files"


class Outcome(NamedTuple):
    """How one program ended; `message` says why it did not pass."""

    status: Literal["passed", "failed", "timeout"]
    message: str
    seconds: float


class Guards(NamedTuple):
    """What this machine's kernel can hold a program back with."""

    landlock: int  # version, 0 without
    seccomp: bool


def guards() -> Guards:
    return Guards(landlock_version(), has_seccomp())


def protection() -> str:
    """One sentence: what programs can and cannot do where `require_protection` passes."""
    landlock = guards().landlock
    files = (
        f"(Landlock {landlock}) read only Python's own files and write only to a fresh folder"
        if landlock
        else "write no file but can read yours (Linux before 5.13, or one without Landlock)"
    )
    return (
        "Programs run locked in: (seccomp) no network, no processes or threads of their own and "
        f"no signals; they {files}, with limits on time, memory and disk."
    )


def require_protection() -> None:
    """ValueError where nothing keeps a program from the network; `protection` says what else."""
    if not guards().seccomp:
        raise ValueError(
            "Running unread programs needs Linux with seccomp on x86_64 or aarch64, and this is "
            f"{sys.platform}: nothing would keep them from your files and the network, so use "
            "such a machine."
        )


def run_program(
    source: str,
    *,
    timeout_s: int = 5,
    memory_mb: int = 1024,
) -> Outcome:
    """Runs `source` to its end. `timeout_s` is processor time; the clock allows four times that.

    Processor time makes an outcome independent of how busy the machine is.
    """
    require_protection()
    token = secrets.token_hex(16).encode()
    token_read, token_write = os.pipe()
    report_read, report_write = os.pipe()
    with (
        os.fdopen(token_read, "rb"),
        os.fdopen(token_write, "wb", 0) as hand_out,
        os.fdopen(report_read, "rb"),
        tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder,
    ):
        with os.fdopen(report_write, "wb"):
            hand_out.write(token)
            program = Path(folder, "program.py")
            program.write_text(source, encoding="utf-8", errors="replace")
            numbers = (timeout_s, memory_mb, *guards(), token_read, report_write)
            process = _start(program, numbers, keep=(token_read, report_write))
        return _watch(process, report_read, Path(folder), token, timeout_s)


def _start(program: Path, numbers: Sequence[int], *, keep: Sequence[int]) -> subprocess.Popen:
    child = Path(__file__).with_name("confined.py")
    return subprocess.Popen(
        [sys.executable, "-P", "-s", "-S", "-B", "-W", "ignore", child, program]
        + [str(int(number)) for number in numbers],
        cwd=program.parent,
        # -I would also ignore the hash seed, without which the order of sets changes every time.
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=keep[-1],  # of Python itself: confined.py cuts it before the program starts
        pass_fds=keep,
        start_new_session=True,
    )


def _watch(
    process: subprocess.Popen, report_fd: int, folder: Path, token: bytes, timeout_s: int
) -> Outcome:
    """Waits for the report's end, the clock's or the disk's; nothing of the program is left."""
    start = time.monotonic()
    report, stopped = b"", None
    try:
        while stopped is None:
            if select.select([report_fd], [], [], _TICK_S)[0]:
                chunk = os.read(report_fd, 4096)
                report += chunk
                if not chunk or len(report) > 4096:
                    break
            elif time.monotonic() - start > CLOCK_PER_CPU * timeout_s:
                stopped = Outcome("timeout", f"over {CLOCK_PER_CPU * timeout_s} s by the clock", 0)
            elif _too_much(folder):
                stopped = Outcome("failed", f"over {_DISK} on disk", 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = time.monotonic() - start
    outcome = stopped or _outcome(process.returncode, report, token)
    over_time = process.returncode == -signal.SIGXCPU or (  # SIGKILL if it ignored that
        process.returncode == -signal.SIGKILL and seconds > timeout_s
    )
    if outcome.status == "failed" and not stopped and over_time:
        outcome = Outcome("timeout", f"over {timeout_s} s of processor time", 0)
    return outcome._replace(seconds=seconds)


def _too_much(folder: Path) -> bool:
    sizes = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # removed since
            sizes.append(os.lstat(entry).st_blocks * 512)
    return sum(sizes) > MAX_DISK_BYTES or len(sizes) > MAX_FILES


def _outcome(returncode: int, report: bytes, token: bytes) -> Outcome:
    before, ready, message = report.partition(b"ready\n")
    if before or not ready:
        reason = before.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"The sandbox did not start (exit status {returncode}): {reason}")
    if message == token:
        return Outcome("passed", "", 0)
    ended = f"ended before its tests did (exit status {returncode})"
    return Outcome("failed", message[:500].decode(errors="replace") or ended, 0)


def run_programs(
    sources: Sequence[str],
    *,
    timeout_s: int = 5,
    memory_mb: int = 1024,
) -> list[Outcome]:
    """`run_program` of all, as many at once as there are processors; outcomes in order."""
    pool = ThreadPoolExecutor(os.cpu_count())
    limits = {"timeout_s": timeout_s, "memory_mb": memory_mb}
    try:
        return list(pool.map(lambda source: run_program(source, **limits), sources))
    finally:
        pool.shutdown(cancel_futures=True)
