"""The child's side of sandbox.py: locks its own process in, then runs one program. Linux.

    python -P -s -S -B confined.py PROGRAM SECONDS MEGABYTES LANDLOCK SECCOMP TOKEN_FD REPORT_FD

Three mechanisms of the kernel, none of which needs root, a namespace or a helper binary, all of
which hold for root too, and none of which can be undone from inside:

    resource limits   processor time, memory, file size, open files
    Landlock          reading: Python's own folders; writing: files in the current directory
    seccomp           a list of allowed system calls; everything else is "Operation not permitted".
                      Not on it: processes and threads, sockets, signals to anyone, programs,
                      permissions, links, folders, mounts, ptrace, fcntl, io_uring.

Without Landlock (Linux before 5.13) seccomp forbids every opening for writing instead. It runs as a
script and imports nothing of the project; the rest of the package never imports it but for tests.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import types

MAX_FILE_BYTES = 8 << 20
MAX_OPEN_FILES = 32

# Names with their numbers on x86_64 and aarch64, which Linux never changes. Missing on purpose:
# fcntl (F_SETOWN sends signals to others), memfd_create (memory that no limit counts), open and
# openat2 (their flags cannot be checked as openat's are).
_ALLOWED = """
read 0 63       write 1 64        close 3 57          fstat 5 80        newfstatat 262 79
statx 332 291   lseek 8 62        pread64 17 67       pwrite64 18 68    readv 19 65
writev 20 66    openat 257 56     getdents64 217 61   getcwd 79 17      chdir 80 49
fchdir 81 50    readlinkat 267 78 faccessat 269 48    faccessat2 439 439  ftruncate 77 46
fsync 74 82     fdatasync 75 83   dup 32 23           dup3 292 24       pipe2 293 59
mmap 9 222      mprotect 10 226   munmap 11 215       mremap 25 216     madvise 28 233
brk 12 214      futex 202 98      sched_yield 24 124  nanosleep 35 101  clock_nanosleep 230 115
times 100 153   uname 63 160      clock_gettime 228 113  clock_getres 229 114  gettimeofday 96 169
getpid 39 172   getppid 110 173   gettid 186 178      getuid 102 174    geteuid 107 175
getgid 104 176  getegid 108 177   getpgid 121 155     getsid 124 156    getrandom 318 278
umask 95 166    getcpu 309 168    getrusage 98 165    sysinfo 99 179    sched_getaffinity 204 123
ppoll 271 73    pselect6 270 72   epoll_create1 291 20  epoll_ctl 233 21  epoll_pwait 281 22
exit 60 93      exit_group 231 94 rt_sigaction 13 134 rt_sigprocmask 14 135  rt_sigreturn 15 139
ioctl 16 29     setitimer 38 103  getitimer 36 102  sigaltstack 131 132  restart_syscall 219 128
"""
_ALLOWED_WITH_LANDLOCK = "unlinkat 263 35  renameat 264 38  renameat2 316 276"
_ALLOWED_X86_64 = """
stat 4  lstat 6  access 21  readlink 89  dup2 33  pipe 22  poll 7  select 23  epoll_wait 232
getpgrp 111  alarm 37  pause 34  time 201  epoll_create 213
"""  # the old forms, which aarch64 never had
_ALLOWED_X86_64_WITH_LANDLOCK = "unlink 87  rename 82"
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def allowed_calls(machine: str, *, landlock: bool) -> dict[str, int]:
    """Name -> number of the system calls a program may make."""
    words = (_ALLOWED + (_ALLOWED_WITH_LANDLOCK if landlock else "")).split()
    table = dict(zip(words[::3], words[2::3] if machine == "aarch64" else words[1::3], strict=True))
    if machine == "x86_64":
        words = (_ALLOWED_X86_64 + (_ALLOWED_X86_64_WITH_LANDLOCK if landlock else "")).split()
        table |= dict(zip(words[::2], words[1::2], strict=True))
    return {name: int(number) for name, number in table.items()}


def seccomp_filter(machine: str, *, landlock: bool) -> bytes:
    """The BPF program, see seccomp(2): the architecture, two calls' arguments, then the list."""
    load, bit_and, equal, any_bit, give = 0x20, 0x54, 0x15, 0x45, 0x06
    allow, refuse, kill = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x50001), (give, 0, 0, 1 << 31)
    calls = allowed_calls(machine, landlock=landlock)

    def check(call: str, argument: int, tests: list, *, then: tuple, otherwise: tuple) -> list:
        """If it is that call: what `then` says where a test of the argument is true."""
        jumps = [0 if test == bit_and else len(tests) - i for i, (test, _) in enumerate(tests)]
        return [
            (equal, 0, len(tests) + 3, calls.pop(call)),
            (load, 0, 0, 16 + 8 * argument),
            *((test, jump, 0, value) for (test, value), jump in zip(tests, jumps, strict=True)),
            otherwise,
            then,
        ]

    if landlock:  # until Linux 6.2 it overlooks O_TRUNC without write access, and access mode 3
        flags = [(bit_and, 3 | os.O_TRUNC), (equal, os.O_TRUNC), (equal, os.O_TRUNC | 3)]
    else:
        flags = [(any_bit, 3 | os.O_CREAT | os.O_TRUNC)]
    close_on_exec = [(equal, 0x5451)]  # FIOCLEX, of files opened by way of tempfile
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, _AUDIT_ARCH[machine]),
        kill,
        (load, 0, 0, 0),
        *check("openat", 2, flags, then=refuse, otherwise=allow),
        *check("ioctl", 1, close_on_exec, then=allow, otherwise=refuse),
    ]
    program += [(equal, len(calls) - i, 0, number) for i, number in enumerate(calls.values())]
    return b"".join(struct.pack("HBBI", *line) for line in [*program, refuse, allow])


def landlock_version() -> int:
    """The version of Landlock this kernel has; 0 without it."""
    if sys.platform != "linux":
        return 0
    return max(0, _syscall(444, None, 0, 1))


def has_seccomp() -> bool:
    """Whether filters can be installed, and we know this machine's system calls."""
    if sys.platform != "linux" or platform.machine() not in _AUDIT_ARCH:
        return False
    _prctl(22, 2, None)  # a filter at address 0: EFAULT where there are filters, else EINVAL
    return ctypes.get_errno() == 14


def limit_resources(seconds: int, megabytes: int) -> None:
    """Limits that hold everywhere, though macOS knows none for memory."""
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),  # SIGXCPU, and a second later SIGKILL
        resource.RLIMIT_FSIZE: (MAX_FILE_BYTES, MAX_FILE_BYTES),
        resource.RLIMIT_NOFILE: (MAX_OPEN_FILES, MAX_OPEN_FILES),
        resource.RLIMIT_NPROC: (0, 0),  # no forks, also where there is no seccomp; not for root
        resource.RLIMIT_CORE: (0, 0),
    }
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = (megabytes << 20, megabytes << 20)
    for kind, limit in limits.items():
        _, most = resource.getrlimit(kind)
        unlimited = most == resource.RLIM_INFINITY
        resource.setrlimit(kind, limit if unlimited else tuple(min(n, most) for n in limit))


def restrict_files(version: int) -> None:
    """Landlock: nothing may be done to any file but what the rules give back."""
    write, read, list_folder, remove, make = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8
    move, truncate = 1 << 13 if version >= 2 else 0, 1 << 14 if version >= 3 else 0
    handled = (1 << 13) - 1 | move | truncate
    ruleset = _check(_syscall(444, struct.pack("=Q", handled), 8, 0), "landlock_create_ruleset")
    libraries = [f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    rules = {path: read | list_folder for path in [*sys.path, *libraries, "/usr/local/lib"]}
    rules |= {"/etc/ld.so.cache": read, "/dev/urandom": read, "/dev/null": read | write | truncate}
    rules[os.getcwd()] = read | list_folder | write | make | remove | truncate
    for path, access in rules.items():
        if os.path.exists(path):
            access &= -1 if os.path.isdir(path) else read | write | truncate
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", access, place)
            _check(_syscall(445, ruleset, 1, rule, 0), "landlock_add_rule")
            os.close(place)
    _check(_syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def restrict_calls(*, landlock: bool) -> None:
    """seccomp: from here on only the allowed system calls."""
    code = ctypes.create_string_buffer(seccomp_filter(platform.machine(), landlock=landlock))
    program = struct.pack("HP", (len(code) - 1) // 8, ctypes.addressof(code))
    _check(_prctl(22, 2, program), "seccomp")


def _syscall(number: int, *args: int | bytes | None) -> int:
    return _call("syscall", number, *args)


def _prctl(option: int, *args: int | bytes | None) -> int:
    return _call("prctl", option, *args)


def _call(function: str, *args: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return getattr(libc, function)(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def main(path: str, *numbers: str) -> None:
    """Lock up, say so, run the program, and only then fetch the token that proves its end."""
    seconds, megabytes, landlock, seccomp, token, report = map(int, numbers)
    read, write, leave = os.read, os.write, os._exit  # the program may put others in their place
    with open(path, encoding="utf-8") as file:
        source = file.read()
    limit_resources(seconds, megabytes)
    if sys.platform == "linux":
        _check(_prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")  # never outlive the parent
        _check(_prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    if landlock:
        restrict_files(landlock)
    if seccomp:
        restrict_calls(landlock=landlock > 0)
    os.dup2(1, 2)  # until here errors went into the report, from here to where prints go
    write(report, b"ready\n")
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program", "exec"), module.__dict__)
        message = read(token, 64)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
        message = text[:500].encode(errors="replace")
    write(report, message)
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
