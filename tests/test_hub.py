"""Models of the hub, by a hub of our own on this machine: what is brought, and what is served while
it is out of reach."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from dynamo_serve import bundled
from tests.patience import PATIENCE_S
from tests.test_cli import body, ready, serving, wait_for

COMMIT = "c" * 40
FETCH = """
import asyncio, sys
from dynamo_serve import hub
from dynamo_serve.cli_model import Files
hub.TIMEOUT_S = 1.0
from dynamo_serve.errors import ConfigError
try:
    files = Files.of(sys.argv[1], sys.argv[2])
    asyncio.run(files.bring_weights())
except ConfigError as error:
    raise SystemExit(str(error))
print(files.folder)
"""
REFUSED = {"org/private": (401, "RepoNotFound"), "org/gated": (403, "GatedRepo")}


class Hub(ThreadingHTTPServer):
    """Has these `files` of org/tiny, and keeps the names of those that it has `sent`."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.sent = files, list[str]()
        self.may_go_on = threading.Event()  # with weights
        self.may_go_on.set()
        self.is_silent = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        model = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if self.server.is_silent.is_set():
            assert self.server.may_go_on.wait(PATIENCE_S)
        elif model != "org/tiny":
            self.answer(b"", *REFUSED.get(model, (404, "RepoNotFound")))
        elif parts[0] != "api":
            name = "/".join(parts[4:])
            self.server.sent += [name] if self.command == "GET" else []
            if name == "model.safetensors" and self.command == "GET":
                assert self.server.may_go_on.wait(PATIENCE_S)
            self.answer(self.server.files[name])
        elif parts[4:5] != ["tree"]:
            self.answer(json.dumps({"id": model, "sha": COMMIT, "siblings": []}).encode())
        else:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            self.answer(json.dumps(tree).encode())

    do_HEAD = do_GET

    def answer(self, data: bytes, code: int = 200, error: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_with(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(files) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


NAMES = (
    *("config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors", "model.gguf"),
    *("pytorch_model.bin", "onnx/model.onnx", "original/model.safetensors", "README.md"),
    *("consolidated.safetensors", "original/consolidated.00.pth", "model.fp16.safetensors"),
    *("bpe.codes", "adapter_model.safetensors"),
)
FILES = {name: name.encode() for name in NAMES}
SETTINGS = {"config.json", "tokenizer.json", "bpe.codes", "1_Pooling/config.json"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def fetch(
    url: str, model: str = "org/tiny", kind: str = "local"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FETCH, model, kind],
        env={**os.environ, "HF_ENDPOINT": url},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def names_in(folder: str) -> set[str]:
    assert folder
    root = Path(folder.strip())
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


def test_settings_and_one_set_of_weights_are_brought_once(cache: Path) -> None:
    with hub_with(FILES) as hub:
        first = fetch(hub.url)
        assert names_in(first.stdout) == {*SETTINGS, "model.safetensors"}
        assert sorted(hub.sent) == sorted({*SETTINGS, "model.safetensors"})
        assert fetch(hub.url).stdout == first.stdout
        assert len(hub.sent) == 5, "again"
    assert fetch(hub.url).stdout == first.stdout, "out of reach"


def test_old_weights_where_there_are_no_others_and_none_for_who_computes_nothing(
    cache: Path,
) -> None:
    files = {name: data for name, data in FILES.items() if name != "model.safetensors"}
    with hub_with(files) as hub:
        assert names_in(fetch(hub.url, kind="triton").stdout) == SETTINGS
        assert names_in(fetch(hub.url).stdout) == {*SETTINGS, "pytorch_model.bin"}


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_parts_are_those_that_their_index_names(cache: Path, kind: str) -> None:
    parts, index = {"one-of-two", "another"}, f"{kind}.index.json"
    files = {name: FILES[name] for name in (*SETTINGS, "adapter_model.safetensors")}
    files |= {name: name.encode() for name in (*parts, "a-third")}
    files[index] = json.dumps({"weight_map": dict(zip("ab", parts, strict=True))}).encode()
    with hub_with(files) as hub:
        folder = fetch(hub.url).stdout
        assert names_in(folder) == {*SETTINGS, *parts, index}
        Path(folder.strip(), "another").unlink()
        assert names_in(fetch(hub.url).stdout) == {*SETTINGS, *parts, index}


def test_no_weights_is_told(cache: Path) -> None:
    with hub_with({name: FILES[name] for name in (*SETTINGS, "consolidated.safetensors")}) as hub:
        assert "neither here nor on the hub are weights of it" in fetch(hub.url).stderr


def test_a_hub_that_says_nothing_is_out_of_reach(cache: Path) -> None:
    with hub_with(FILES) as hub:
        first = fetch(hub.url)
        hub.may_go_on.clear()
        hub.is_silent.set()
        try:
            assert fetch(hub.url).stdout == first.stdout
        finally:
            hub.may_go_on.set()


def test_what_is_here_in_part_is_told_where_the_hub_is_out_of_reach(cache: Path) -> None:
    with hub_with(FILES) as hub:
        folder = fetch(hub.url, kind="triton").stdout
    Path(folder.strip(), "tokenizer.json").unlink()
    found = fetch(hub.url, kind="triton")
    assert (found.returncode, found.stdout) == (0, folder)
    assert "what is here of org/tiny is served, the hub cannot be asked: " in found.stderr
    assert "org/tiny: files are missing" in found.stderr


def test_what_cannot_be_had_is_told_with_the_remedy(cache: Path) -> None:
    with hub_with(FILES) as hub:
        for model in ("org/unknown", "org/private"):
            assert "no such model on the hub that can be seen" in fetch(hub.url, model).stderr
        assert "its terms have to be accepted" in fetch(hub.url, "org/gated").stderr
    gone = fetch(hub.url)
    assert gone.returncode == 1
    assert "no whole copy of it from the hub, and the hub cannot be asked" in gone.stderr
    assert "Traceback" not in gone.stderr


def test_a_server_of_a_hub_id_starts_again_without_the_hub(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {file.name: file.read_bytes() for file in bundled.path().iterdir() if file.is_file()}
    with hub_with(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        answers = [ask()]
        assert "model.safetensors" in hub.sent
    answers.append(ask())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_answers_while_weights_come_and_can_be_stopped(
    cache: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    files = {file.name: file.read_bytes() for file in bundled.path().iterdir() if file.is_file()}
    with hub_with(files) as hub, socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.may_go_on.clear()
        port = free.getsockname()[1]
        free.close()
        command = (sys.executable, "-m", "dynamo_serve", "serve", "--model", "org/tiny")
        server = subprocess.Popen([*command, "--port", str(port)])
        try:
            wait_for(lambda: "model.safetensors" in hub.sent)
            url = f"http://127.0.0.1:{port}"
            assert not ready(url)
            assert httpx.get(url + "/health").status_code == 200
            server.send_signal(number)
            assert server.wait(PATIENCE_S) == (0 if number == signal.SIGTERM else -number)
            wait_for(lambda: not any(str(cache) in environ_of(pid) for pid in os.listdir("/proc")))
        finally:
            server.kill()
            server.wait(PATIENCE_S)
            hub.may_go_on.set()


def environ_of(pid: str) -> str:
    try:
        return Path("/proc", pid, "environ").read_text(errors="replace")
    except OSError:  # it has ended, or is not ours
        return ""


def ask() -> object:
    with serving("--model", "org/tiny", "--set", "engine.kind=local") as server:
        wait_for(lambda: ready(server.url))
        wanted = {**body(8), "model": "org/tiny", "stream": False}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=wanted, timeout=PATIENCE_S)
        return answer.json()["choices"]
