"""Programs that try to do harm, each of which runs to its end only if it succeeded.

They may use what `facts` defines: DECOY, a folder with a file "kept"; PORT, of a server on this
machine; VICTIM, a process. None is aimed at anything else, and none grows without bound in number,
for the day that a sandbox leaks.
"""

import socket
import subprocess
from pathlib import Path
from typing import Any


def facts(decoy: Path, server: socket.socket, victim: subprocess.Popen) -> str:
    """The first lines of every attack."""
    names = {"DECOY": str(decoy), "PORT": server.getsockname()[1], "VICTIM": victim.pid}
    imports = "import os, sys, time, ctypes, shutil, signal, socket, subprocess, threading\n"
    return imports + "".join(f"{name} = {value!r}\n" for name, value in names.items())


READING = {  # nothing holds these back without Landlock
    "read a file of the user": "open(DECOY + '/kept').read()",
    "list a folder of the user": "os.listdir(DECOY)",
    "read the parent's environment": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
}
QUICK = READING | {
    "fork bomb": "for _ in range(100):\n    if os.fork() == 0: time.sleep(9); os._exit(0)",
    "vfork and exec": "subprocess.run(['true'], check=True)",
    "a shell": "assert os.system('true') == 0",
    "exec": "os.execv('/bin/true', ['true'])",
    "thread bomb": "for _ in range(100): threading.Thread(target=time.sleep, args=(9,)).start()",
    "a survivor, forked twice, of its own session": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(9)\n    os._exit(0)"
    ),
    "4 GiB at once": "x = bytearray(4 << 30)",
    "4 GiB bit by bit": "x = []\nfor _ in range(4096): x.append(bytearray(1 << 20))",
    "4 GiB of anonymous files": "fd = os.memfd_create('x')",
    "shared memory that stays": "assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
    "rm -rf by Python": "shutil.rmtree(DECOY)",
    "rm -rf by rm": "subprocess.run(['rm', '-rf', DECOY], check=True)",
    "remove a file": "os.remove(DECOY + '/kept')",
    "move a file away": "os.rename(DECOY + '/kept', 'mine')",
    "overwrite a file": "open(DECOY + '/kept', 'w').write('x')",
    "append to a file": "open(DECOY + '/kept', 'a').write('x')",
    "cut a file": "os.truncate(DECOY + '/kept', 0)",
    "cut a file by opening it for reading": "os.open(DECOY + '/kept', os.O_RDONLY | os.O_TRUNC)",
    "cut a file by opening it in mode 3": "os.open(DECOY + '/kept', 3 | os.O_TRUNC)",
    "a new file outside": "open(DECOY + '/new', 'w')",
    "a new folder outside": "os.mkdir(DECOY + '/new')",
    "change permissions": "os.chmod(DECOY + '/kept', 0)",
    "change times": "os.utime(DECOY + '/kept', (0, 0))",
    "a symbolic link to a folder": "os.symlink(DECOY, 'link'); open('link/new', 'w')",
    "a hard link to a file": "os.link(DECOY + '/kept', 'link'); open('link', 'w')",
    "the way up": "open('/'.join(['..'] * 20) + DECOY + '/new', 'w')",
    "a nest of folders that cannot be removed": (
        "for _ in range(2000): os.mkdir('x'); os.chdir('x')"
    ),
    "connect to a server": "socket.create_connection(('127.0.0.1', PORT), timeout=5)",
    "send a datagram": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "open a local socket": "socket.socketpair()",
    "io_uring, which opens sockets unseen": (
        "assert ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256)) >= 0"
    ),
    "kill a process": "os.kill(VICTIM, 9)",
    "signal the parent": "os.kill(os.getppid(), 0)",
    "signals by way of a pipe": (
        "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, VICTIM)"
    ),
    "type into the terminal": "import fcntl; fcntl.ioctl(1, 0x5412, b'x')",
    "trace a process": "assert ctypes.CDLL(None).ptrace(16, VICTIM, None, None) == 0",
    "make the parent nicer": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "limits back up": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "a namespace of its own": "assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "secrets of the environment": "assert any('KEY' in name for name in os.environ)",
    "read the terminal": "input()",
    "a file over 8 MiB": "open('big', 'wb').write(bytes(9 << 20))",
    "leave with SystemExit(0) before the tests": "raise SystemExit(0)\nassert False",
    "leave with os._exit(0) before the tests": "os._exit(0)\nassert False",
    "leave in a function that the tests call": "def f(): sys.exit()\nassert f() == 1",
    "another AssertionError": "import builtins; builtins.AssertionError = int\nassert False",
    "no traceback": "sys.excepthook = print; sys.exit = print\nassert False",
    "a crash": "ctypes.string_at(0)",
    "endless recursion": "def f(): f()\nf()",
    "an error that cannot be printed": (
        "class E(Exception):\n    def __str__(self): raise self\nraise E"
    ),
    "no Python at all": "Sure! Here is the function:",
    "a byte that no source has": "x = '\0'",
}
SLOW = {  # until a limit of time, or the disk's
    "endless loop": "while True: pass",
    "endless loop that ignores signals": (
        "for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "sleep forever": "time.sleep(1e6)",
    "endless output": "while True: print('x' * 100_000, file=sys.stderr); print('x' * 100_000)",
    "fill the disk": (
        "for i in range(10**6):\n    with open(str(i), 'wb') as f: f.write(bytes(4 << 20))"
    ),
    "fill the disk with small files": "for i in range(10**7): open(str(i), 'w').close()",
    "one line that never ends": "9 ** 9 ** 9",
}


def traces(decoy: Path, server: socket.socket, victim: subprocess.Popen) -> list[str]:
    """What harm was done."""
    kept = decoy / "kept"
    found: dict[str, Any] = {
        "the folder has changed": [p.name for p in decoy.iterdir()] != ["kept"],
        "the file has changed": not kept.exists() or kept.read_text() != "kept",
        "the file's mode or time has changed": kept.stat().st_mode & 0o777 == 0
        or kept.stat().st_mtime == 0,
        "the process is gone": victim.poll() is not None,
    }
    server.setblocking(False)
    try:
        server.accept()
        found["the server was reached"] = True
    except BlockingIOError:
        pass
    return [what for what, happened in found.items() if happened]
