"""What a process gives up for good before it touches strangers' bytes: files, network, privileges.

Only Python's own library is needed: `python -I -S sandbox.py --write FOLDER … -- PROGRAM …` runs a program
so. Where the kernel has no Landlock (before 5.13, or not switched on), `landlock_version` is 0 and files stay
as they were.

Sources: landlock(7), prctl(2), unshare(2), setrlimit(2); the kernel's include/uapi/linux/landlock.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import ctypes
import os
from pathlib import Path
import resource
import socket
import struct
import subprocess
import sys
from typing import IO

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 1, 15, 38
_CLONE_NEWNET = 0x4000_0000
#: System calls of Landlock, the same on every architecture.
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
#: Rights over files that a version knows: version 1 has 13, the next ones REFER, TRUNCATE and, in 5,
#: IOCTL_DEV.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_EXECUTE, _READ_FILE, _READ_FOLDER = 1 << 0, 1 << 2, 1 << 3
_READ = _EXECUTE | _READ_FILE | _READ_FOLDER
#: Rights over a file that is no folder: EXECUTE, WRITE_FILE, READ_FILE, TRUNCATE, IOCTL_DEV.
_OF_A_FILE = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_TCP, _SCOPES = 0b11, 0b11  # BIND and CONNECT; abstract Unix sockets and signals
#: What a program needs of a machine: its libraries, and what it asks the kernel. Not /dev/shm: others' images are there.
SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc",
    "/proc",
    "/sys",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
)

#: Memory that is given back to the kernel after each image, and asked for again, costs more than passing the
#: image on.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(64 * 1024**2), "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2)}
_CODE = Path(__file__).resolve().parent.parent
_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """The version of Landlock's interface; 0 where the kernel has none."""
    return max(0, int(_libc.syscall(_CREATE, None, ctypes.c_size_t(0), _VERSION)))


def forbid_new_privileges() -> None:
    """Have no program that is run from here gain by its set-user-ID bit; Landlock asks for this first."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def end_with_parent(signal_number: int) -> None:
    """Have this process sent a signal when the thread that made it ends. Lost when the account changes."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0))


def leave_network() -> bool:
    """Go where there is no network, not even loopback; False where this process may not."""
    return int(_libc.unshare(_CLONE_NEWNET)) == 0


def restrict_files(
    *,
    read: Iterable[os.PathLike[str] | str] = (),
    write: Iterable[os.PathLike[str] | str] = (),
    network: bool,
) -> bool:
    """Leave this thread and its children these files and folders alone; no way back. False without Landlock.

    Nor may it look into, or (version 6) signal, a process that is not so restricted. Without `network` it
    opens no TCP connection (version 4) and no abstract Unix socket (6). A path that is not there is left out.
    """
    version = landlock_version()
    if not version:
        return False
    rights = (1 << _RIGHTS.get(version, 16)) - 1
    tcp, scopes = (0, 0) if network else (_TCP, _SCOPES)
    whole = struct.pack("=QQQ", rights, tcp, scopes)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _checked(_libc.syscall(_CREATE, whole, ctypes.c_size_t(len(whole)), 0))
    try:
        for paths, allowed in ((read, rights & _READ), (write, rights)):
            for path in paths:
                _allow(ruleset, Path(path), allowed)
        forbid_new_privileges()
        _checked(_libc.syscall(_RESTRICT, ruleset, 0))
    finally:
        os.close(ruleset)
    return True


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rule = struct.pack("=Qi", rights if path.is_dir() else rights & _OF_A_FILE, descriptor)
        _checked(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    finally:
        os.close(descriptor)


def name(title: str) -> None:
    """Name this process for `ps` and `top`; 15 letters."""
    _checked(_libc.prctl(_PR_SET_NAME, title.encode(), 0, 0, 0))


def python_path() -> str:
    """Where our processes look for code: ours, then $PYTHONPATH without what depends on where they start."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(_CODE), *(path for path in given if path.startswith(os.sep))])


def listen(address: str) -> socket.socket:
    """Make a Unix socket to listen on, for this account alone; what lay there of one before goes."""
    if not address.startswith("\0"):
        Path(address).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(128)
    return listener


def start(
    module: str,
    listener: socket.socket,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    log: int | IO[str] = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start one of our modules on a socket, its first argument, with nothing of our own environment."""
    command = [sys.executable, "-P", "-m", module, str(listener.fileno()), *map(str, arguments)]
    own = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    return subprocess.Popen(
        command,
        env={**(environment or {}), **own, **_KEEP_MEMORY},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=[listener.fileno()],
        start_new_session=True,
    )


def forbid_growth() -> None:
    """Open no file and no socket, write to none, start no process and no thread; what is open stays open.

    For an account other than root, which these limits do not bind.
    """
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        resource.setrlimit(limit, (0, 0))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def main(arguments: list[str]) -> None:
    """Run a program that may use the system's own files, and below `--read` and `--write` others."""
    end = arguments.index("--")
    named: dict[str, list[str]] = {"--read": [], "--write": ["/dev/null"]}
    for option, value in zip(arguments[:end:2], arguments[1:end:2], strict=True):
        named[option].append(value)
    program = arguments[end + 1 :]
    restrict_files(read=[*SYSTEM, *named["--read"]], write=named["--write"], network=True)
    os.execv(program[0], program)  # noqa: S606  no shell


if __name__ == "__main__":
    main(sys.argv[1:])
