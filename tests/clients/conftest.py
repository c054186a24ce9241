"""A server with the bundled model, and what the clients' own programs say of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from dynamo_serve.bench import own_server
from scripts import clients
from scripts.clients import Kit
from tests.clients.judging import InOnePiece, Judge
from tests.patience import PATIENCE_S
from tests.tries import sooner_or_later

SCRIPTS = Path(__file__).parent / "scripts"
KEEPING = ("--set", "responses.store=default")  # as OpenAI does, on which some clients rely
OFFLINE = {
    "DO_NOT_TRACK": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches one
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture(scope="package")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Where a server with the bundled model listens, without /v1."""
    log = tmp_path_factory.mktemp("server") / "log"
    with own_server.running(KEEPING, log, PATIENCE_S, lambda waited: None) as url:
        yield url


def environment(home: Path) -> dict[str, str]:
    """Nothing of ours: no keys, no paths, no settings that somebody has at home."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, **OFFLINE, "HOME": str(home)}


class Programs:
    """Runs each program once with a kit's packages for a server; what its features came to is
    then asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told: dict[tuple[str, str, str], dict[str, Any]] = {}

    def judge(self, judge: Judge, kit: Kit, program: str, feature: str, url: str) -> None:
        """Whether `feature` came to what it has to, and once in pieces where it is a stream."""

        def attempt() -> bool | None:
            try:
                judge(self.ask(kit, program, feature, url))
            except InOnePiece:
                del self._told[kit.name, program, url]
                return None
            return True

        assert sooner_or_later(attempt, "in pieces")

    def ask(self, kit: Kit, program: str, feature: str, url: str) -> Any:
        """What `feature` of a program came to; fails with the program's own words."""
        key = (kit.name, program, url)
        if key not in self._told:
            skip_without(kit)
            self._told[key] = self._run(kit, program, url)
        told = self._told[key]
        if "error" in told[feature]:
            pytest.fail(f"{program}, {feature}: {told[feature]['error']}", pytrace=False)
        return told[feature]["value"]

    def _run(self, kit: Kit, program: str, url: str) -> dict[str, Any]:
        command = self._node(program) if kit is clients.NODE else [python(kit), SCRIPTS / program]
        done = subprocess.run(
            [*command, url],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            cwd=self.folder,
            env=environment(self.folder),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told

    def _node(self, program: str) -> list[str | Path]:
        # Node looks for packages beside the file that asks for them.
        modules = self.folder / "node_modules"
        if not modules.exists():
            modules.symlink_to(clients.NODE.folder / "node_modules")
            for path in SCRIPTS.glob("*.mjs"):
                shutil.copy(path, self.folder)
        return [clients.node(), self.folder / program]


def python(kit: Kit) -> Path:
    return kit.folder / "bin" / "python"


def skip_without(kit: Kit) -> None:
    if reason := kit.why_not():
        pytest.skip(f"clients for {kit.name} cannot run here: {reason}")
    if not kit.is_installed():
        pytest.skip(f"clients for {kit.name} are not installed: make clients")


@pytest.fixture(scope="package")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("programs"))
