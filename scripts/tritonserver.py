"""A real NVIDIA Triton server without docker or a GPU: install it below build/, start it.

The server comes out of a wheel that is made for something else (`nvidia-pytriton`): only its files
are used, and they stay out of the project's own environment, for its python backend needs
numpy < 2. Python models run in an environment of their own, with the interpreter that runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = ROOT / "build" / "tritonserver"
MODELS = ROOT / "triton_models"
WHEEL = "nvidia-pytriton==0.7.0"  # tritonserver 2.51.0
NUMPY = "numpy==1.26.4"  # with 2 the backend reads wrong values without a word
RECIPE = f"{WHEEL} {NUMPY} 2"  # another one is installed anew
MARK = HOME / "installed"
GLIBC = (2, 35)
PYTHONS = ((3, 8), (3, 12))  # there is a stub for, and that numpy for
# Ends the server with whoever started it, however that ends: its standard input is closed then.
GUARD = """
import glob, os, signal, subprocess, sys, threading
server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
def watch():
    sys.stdin.buffer.read()
    for left in glob.glob(sys.argv[1]):
        os.unlink(left)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
code = server.wait()
os._exit(code if code >= 0 else 128 - code)  # as shells tell signals
"""
SHARED = Path("/dev/shm")  # where the python backend has its memory
READY_SECONDS = 180.0
LOOK_SECONDS = 0.05
END_SECONDS = 8.0
LAST_WORDS = 4000  # characters


def why_not() -> str:
    """Why no such server can run here; empty if one can."""
    name, version = platform.libc_ver()
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name != "glibc" or found < GLIBC:
        return f"it needs glibc {GLIBC[0]}.{GLIBC[1]}, this is {name or 'no glibc'} {version}"
    if platform.machine() != "x86_64":
        return f"it is built for x86_64, this is {platform.machine()}"
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return "its python backend needs Python 3.8 to 3.12: run this with one of them"
    if not list(_library_folder().glob("libpython3*.so*")):
        return f"there is no libpython in {_library_folder()}: a Python built with --enable-shared"
    return ""


def is_installed() -> bool:
    return MARK.exists() and MARK.read_text() == RECIPE


def install() -> None:
    """Download and lay out the server, once."""
    if is_installed():
        return
    stub = HOME / "python"
    venv.create(stub, with_pip=True, clear=True)
    pip = [str(stub / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, NUMPY], check=True)
    subprocess.run([*pip, "--no-deps", "--target", str(HOME / "wheel"), WHEEL], check=True)
    backend = HOME / "backends" / "python"
    backend.mkdir(parents=True, exist_ok=True)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parts = [*(_server() / "backends" / "python").iterdir()]
    parts.append(_server() / "python_backend_stubs" / version / "triton_python_backend_stub")
    for part in parts:
        (backend / part.name).unlink(missing_ok=True)
        (backend / part.name).symlink_to(part)
    # Our own engine may run inside: what it imports, behind numpy of the version above.
    packages = next(stub.glob("lib/python*/site-packages"))
    paths = [sysconfig.get_paths()["purelib"], str(ROOT)]
    (packages / "zz_project.pth").write_text("\n".join(paths))
    MARK.write_text(RECIPE)


def _server() -> Path:
    return HOME / "wheel" / "pytriton" / "tritonserver"


def _library_folder() -> Path:
    return Path(sysconfig.get_config_var("LIBDIR"))


@dataclass(frozen=True)
class Ports:
    http: int
    grpc: int
    metrics: int


@dataclass(eq=False)
class Running:
    """A server that is ready; its log is in the file `log`."""

    process: subprocess.Popen[bytes]
    ports: Ports
    log: Path
    code: tuple[str, ...]

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports.metrics}/metrics") as answer:
            return str(answer.read().decode())

    def revive(self, load: Iterable[str]) -> str:
        """If it has ended, start it again where it was; how it ended, with the end of its log, and
        nothing while it runs. Raises `RuntimeError` as `wait` does."""
        if self.process.poll() is None:
            return ""
        told = f"it ended with code {self.process.returncode}:\n{self.last_words()}"
        self.kill()
        self.process = _start(self.code, self.log)
        wait(self, load)
        return told

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-LAST_WORDS:]

    def kill(self) -> None:
        """End it at once, and the processes of its models: one of these may outlive it."""
        assert self.process.stdin is not None
        if self.process.stdin.closed:  # done, and the number may be another's by now
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(END_SECONDS)
        self.process.stdin.close()
        for left in SHARED.glob(f"{_region(self.ports)}*"):
            left.unlink(missing_ok=True)


def free_ports() -> Ports:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return Ports(*(each.getsockname()[1] for each in sockets))


def _region(ports: Ports) -> str:
    """What the names of its shared memory begin with, so that only its own is removed."""
    return f"dserve_triton_{ports.grpc}_"


def command(models: Path, load: Iterable[str], ports: Ports) -> list[str]:
    return [
        str(_server() / "bin" / "tritonserver"),
        f"--model-repository={models}",
        f"--backend-directory={HOME / 'backends'}",
        f"--backend-config=python,shm-region-prefix-name={_region(ports)}",
        f"--cache-directory={_server() / 'caches'}",
        "--disable-auto-complete-config",
        "--allow-gpu-metrics=false",
        "--exit-timeout-secs=3",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in load),
        *(f"--{what}-address=127.0.0.1" for what in ("http", "grpc", "metrics")),
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
    ]


def environment() -> dict[str, str]:
    """The stub takes its interpreter from PATH and its library from LD_LIBRARY_PATH; it reads
    neither PYTHONPATH nor PYTHONHOME."""
    path = os.pathsep.join([str(HOME / "python" / "bin"), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "LD_LIBRARY_PATH": str(_library_folder())}


def launch(
    load: Iterable[str],
    log: Path,
    *,
    models: Path = MODELS,
    ports: Ports | None = None,
    flags: Iterable[str] = (),
) -> Running:
    """Start a server in a session of its own; `wait` says when it is ready."""
    ports = ports or free_ports()
    left = str(SHARED / f"{_region(ports)}*")
    code = (sys.executable, "-c", GUARD, left, *command(models, load, ports), *flags)
    return Running(_start(code, log), ports, log, code)


def _start(code: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            code,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait(server: Running, load: Iterable[str]) -> None:
    """Until these models are ready. Raises `RuntimeError` with the end of the log."""
    until = time.monotonic() + READY_SECONDS
    wanted = [f"http://127.0.0.1:{server.ports.http}/v2/models/{name}/ready" for name in load]
    while wanted and time.monotonic() < until and server.process.poll() is None:
        if _answers(wanted[0]):
            wanted.pop(0)
        else:
            time.sleep(LOOK_SECONDS)
    if wanted:
        raise RuntimeError(f"{wanted[0]} does not get ready:\n{server.last_words()}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=READY_SECONDS) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


@contextlib.contextmanager
def running(
    load: Iterable[str],
    log: Path,
    *,
    models: Path = MODELS,
    ports: Ports | None = None,
    flags: Iterable[str] = (),
) -> Generator[Running]:
    server = launch(load, log, models=models, ports=ports, flags=flags)
    try:
        wait(server, load)
        yield server
    finally:
        server.kill()


def names_in(models: Path) -> list[str]:
    return sorted(path.parent.name for path in models.glob("*/config.pbtxt"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="model repository")
    parser.add_argument("--load", action="append", help="a model of it; default: all")
    parser.add_argument("--install-only", action="store_true")
    for number, what in enumerate(("http", "grpc", "metrics")):
        parser.add_argument(f"--{what}-port", type=int, default=18000 + number)
    given = parser.parse_args()
    if reason := why_not():
        print(f"Triton cannot be installed here: {reason}", file=sys.stderr)
        return 1
    install()
    if given.install_only:
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    load = given.load or names_in(given.models)
    ports = Ports(given.http_port, given.grpc_port, given.metrics_port)
    try:
        with running(load, HOME / "log", models=given.models.resolve(), ports=ports) as server:
            print(f"Triton serves {', '.join(load)}: gRPC on {server.endpoint}, log {server.log}")
            server.process.wait()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
