"""The command line: what it refuses in one line, and a server from its start to its drain."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from dynamo_serve import __version__, bundled, chat, cli
from dynamo_serve.cli_progress import Progress
from dynamo_serve.directory import digest
from tests.architecture.source import ROOT
from tests.patience import PATIENCE_S


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DYNAMO_SERVE_SERVER__PORT", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "version") == (0, f"dynamo-serve {__version__}\n", "")


def test_the_package_is_the_command_too() -> None:
    line = (sys.executable, "-m", "dynamo_serve", "--version")
    told = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert told.stdout == f"dynamo-serve {__version__}\n"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("serve --prot 9", "unknown: --prot 9; did you mean --port?"),
        ("serve --max-model-len 100", "did you mean --set model.max_model_len=VALUE?"),
        ("serve --api-key abc", "did you mean --set server.api_keys=VALUE?"),
        ("serve --page_size=8", "did you mean --set cache.page_size=VALUE?"),
        ("serve Qwen/Qwen3-0.6B", "did you mean --model Qwen/Qwen3-0.6B?"),
        ("serve --bananas", "unknown: --bananas\n"),
        ("chat --max-token 5", "did you mean --max-tokens?"),
        ("bench run http://x --rat 5", "did you mean --rate?"),
    ],
)
def test_an_unknown_flag_is_told_with_what_was_meant(
    capsys: pytest.CaptureFixture[str], line: str, hint: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err


def test_good_settings_are_called_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check-config") == (0, "settings are valid\n", "")
    code, out, _ = run(capsys, "check-config", "--tenants", str(ROOT / "configs/tenants.yaml"))
    assert (code, out) == (0, "settings are valid; tenants: web, research\n")


def test_print_shows_values_with_their_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DYNAMO_SERVE_SERVER__PORT", "9001")
    file = tmp_path / "s.yaml"
    file.write_text("cache: {page_size: 32}\n")
    flags = ["--model", "m", "--served-model-name", "a", "b", "--set", "log.level=debug"]
    code, out, _ = run(capsys, "check-config", "--print", "--config", str(file), *flags)
    assert code == 0
    lines = dict(re.findall(r"^  (.*?) +# (.*)$", out, re.MULTILINE))
    assert lines["port: 9001"] == "environment DYNAMO_SERVE_SERVER__PORT"
    assert lines["page_size: 32"] == f"file {file}"
    assert lines['path: "m"'] == "flag --model"
    assert lines['served_names: ["a", "b"]'] == "flag --served-model-name"
    assert lines['level: "debug"'] == "flag --set log.level"
    assert lines["max_waiting: 10000"] == "default"


def test_a_named_flag_wins_over_set(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--port", "1", "--set", "server.port=2"]
    assert "port: 1 " in run(capsys, "check-config", "--print", *flags)[1]


def test_served_names_add_up_over_several_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--served-model-name", "a", "b", "--served-model-name", "c"]
    assert '["a", "b", "c"]' in run(capsys, "check-config", "--print", *flags)[1]


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_bad_setting_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    code, out, err = run(capsys, command, "--port", "http")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "server.port = 'http': not allowed; allowed: a whole number" in err
    assert "flag --port" in err


def test_a_port_in_use_is_told_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run(capsys, "serve", "--port", str(port))
    assert code == 2
    assert err.startswith(f"dynamo-serve: server.port = {port}: Address already in use")
    assert "--port" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./none", "no such folder"),
        (".", "this folder holds no config.json"),
    ],
)
def test_a_missing_model_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    path: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "serve", "--model", path, "--port", "0")
    assert code == 2
    assert f"model.path = '{path}': {message}" in err
    assert err.count("\n") == 1


def test_a_folder_without_a_tokenizer_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = run(capsys, "serve", "--model", str(tmp_path), "--port", "0")
    assert code == 2
    assert "no tokenizer" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "t5", "gpt2"])
def test_an_empty_tokenizer_of_a_known_family_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    code, _, err = run(capsys, "serve", "--model", str(tmp_path), "--port", "0")
    assert code == 2
    assert "no tokenizer: its files are missing" in err
    assert err.count("\n") == 1


HUB_WARNS = """
import logging, sys
from dynamo_serve import cli
code = cli.main(["serve", "--model", "no/such", "--port", "0"])
logging.getLogger("huggingface_hub.utils").warning("cannot be reached")
sys.exit(code)
"""


def test_a_hub_that_is_out_of_reach_is_told_once(tmp_path: Path) -> None:
    around = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    line = (sys.executable, "-c", HUB_WARNS)
    told = subprocess.run(
        line, check=False, capture_output=True, text=True, timeout=PATIENCE_S, env=around
    )
    assert told.returncode == 2
    assert (
        "there is no such folder here, no whole copy of it from the hub, and the hub" in told.stderr
    )
    assert told.stderr.count("cannot be reached") == 1


def test_a_file_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    code, _, err = run(capsys, "serve", "--model", str(tmp_path / "model.gguf"), "--port", "0")
    assert code == 2
    assert "this is a file; allowed: a folder" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"a": 1}'),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "[1]"),
        ("config.json", "[]"),
    ],
)
def test_a_broken_tokenizer_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str, text: str
) -> None:
    for source in bundled.path().iterdir():
        if source.suffix in (".json", ".jinja"):
            shutil.copy(source, tmp_path)
    (tmp_path / file).write_text(text)
    code, _, err = run(capsys, "serve", "--model", str(tmp_path), "--port", "0")
    assert code == 2
    assert "no tokenizer: " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 70, "a..b"])
def test_an_address_that_is_not_here_is_one_line(
    capsys: pytest.CaptureFixture[str], host: str
) -> None:
    code, _, err = run(capsys, "serve", "--host", host, "--port", "0")
    assert code == 2
    assert f"server.host = '{host}'" in err


@pytest.mark.parametrize("heat", ["-1", "nan", "inf"])
def test_a_temperature_that_is_none_is_one_line(
    capsys: pytest.CaptureFixture[str], heat: str
) -> None:
    code, _, err = run(capsys, "chat", "--temperature", heat)
    assert code == 2
    assert err == f"dynamo-serve: --temperature {heat}: allowed: 0 or more\n"


def test_a_reader_that_has_enough_ends_the_command_quietly() -> None:
    command = [sys.executable, "-m", "dynamo_serve.cli", "check-config", "--print"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, timeout=PATIENCE_S, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (cli.OUTPUT_CLOSED, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_stream_is_not_taken_for_another_file(closed: str) -> None:
    program = "import os; from dynamo_serve import cli; code = cli.main(['version'])\n"
    program += "raise SystemExit(code or (0 if os.open(os.devnull, 0) > 2 else 3))"
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has one")
def test_a_full_standard_output_stops_no_server() -> None:
    program = "from dynamo_serve.cli_serve import tell; tell('Try:'); tell('this')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    assert done.returncode == 0
    assert "cannot write to standard output: No space left" in done.stderr


def test_chat_without_a_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        code, _, err = run(capsys, "chat", "--url", url)
    assert code == 2
    assert err.startswith(f"dynamo-serve: no answer from {url}")


# --- names and addresses


def test_names_are_derived_from_the_path_unless_given(tmp_path: Path) -> None:
    from dynamo_serve.cli_model import served_names
    from dynamo_serve.config import ModelSection

    folder = tmp_path / "my-model"
    folder.mkdir()
    assert served_names(ModelSection()) == ("dserve-tiny",)
    assert served_names(ModelSection(path=str(folder))) == ("my-model",)
    assert served_names(ModelSection(path="org/model")) == ("org/model",)
    assert served_names(ModelSection(path="org/model"), "llama") == ("llama",)
    assert served_names(ModelSection(path="org/model", served_names=("a", "b"))) == ("a", "b")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("10.1.2.3", "http://10.1.2.3:80"),
    ],
)
def test_the_url_shown_works_on_this_machine(host: str, url: str) -> None:
    from dynamo_serve.cli_serve import base_url

    assert base_url(host, 80) == url


# --- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def scripted(*times: float) -> Callable[[], float]:
    left = list(times)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_a_terminal_gets_one_bar_per_stage() -> None:
    out = Terminal()
    progress = Progress(out, scripted(0.0, 2.5, 10.0))
    progress("weights", 0.0)
    progress("weights", 0.5)
    progress("weights", 1.0)
    progress("warm-up", 0.0)
    lines = out.getvalue().split("\n")
    assert lines[0].startswith("\rweights    [" + "-" * 30 + "]   0%\r")
    assert lines[0].endswith("[" + "#" * 30 + "] 100%  2.5 s")
    assert lines[1].startswith("\rwarm-up")
    assert len(lines) == 2


def test_a_note_stands_behind_the_bar_and_takes_a_longer_ones_place() -> None:
    out = Terminal()
    progress = Progress(out, scripted(0.0))
    progress("load", 0.5, "12 under way")
    progress("load", 0.6, "3 under way")
    assert out.getvalue().count("\x1b[K") == 2
    assert out.getvalue().endswith("]  60%  3 under way\x1b[K")


def test_a_log_gets_plain_lines_and_not_too_many(caplog: pytest.LogCaptureFixture) -> None:
    out = io.StringIO()
    progress = Progress(out, scripted(*(float(second) for second in range(40))))
    with caplog.at_level("INFO", logger="dynamo_serve"):
        for percent in range(0, 101, 10):
            progress("weights", percent / 100)
    assert out.getvalue() == ""
    assert caplog.messages[0] == "weights: started"
    assert caplog.messages[-1].startswith("weights: done in ")
    assert 1 <= len(caplog.messages[1:-1]) <= 4


# --- a server


class Server(NamedTuple):
    process: subprocess.Popen[str]
    url: str
    greeting: str


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """A server with the fake engine on a free port; whatever happens, it is gone afterwards."""
    command = [sys.executable, "-m", "dynamo_serve.cli", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--set", "engine.kind=fake", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        greeting = "".join(process.stdout.readline() for _ in range(5))
        found = re.search(r"http://[\d.]+:\d+", greeting)
        assert found, process.communicate(timeout=PATIENCE_S)
        yield Server(process, found.group(), greeting)
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def body(max_tokens: int) -> dict[str, object]:
    message = {"role": "user", "content": "hi"}
    limits = {"max_tokens": max_tokens, "ignore_eos": True}
    return {"messages": [message], "stream": True, **limits}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline


def ready(url: str) -> bool:
    return httpx.get(url + "/ready").status_code == 200


def test_a_server_greets_answers_and_stops() -> None:
    names = ("--served-model-name", "mine", "dserve-tiny")
    with serving(*names, "--set", "model.max_model_len=200") as server:
        assert "serves mine on " + server.url in server.greeting
        assert "dynamo-serve chat --url " + server.url in server.greeting
        assert server.url + "/openapi.json" in server.greeting
        curl = re.search(r"curl -N (\S+) .* -d '(.*)'", server.greeting)
        assert curl
        answer = httpx.post(curl[1], json={**json.loads(curl[2]), "max_tokens": 3})
        assert answer.status_code == 200
        assert answer.text.rstrip().endswith("data: [DONE]")
        out = io.StringIO()
        asked = chat.Options(url=server.url, max_tokens=4)
        assert chat.run(asked, io.StringIO("one\ntwo\n"), out) == 0
        assert len(out.getvalue()) > 2
        metrics = httpx.get(server.url + "/metrics").text
        assert 'dserve_finishes_total{finish="length"} 3.0' in metrics
        assert 'vllm:num_requests_running{model_name="mine"} 0.0' in metrics
        follow_the_readme(server.url)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE_S) == 0


def test_what_only_tokenizes_loads_no_torch() -> None:
    """Which would be most of its memory, and a second of its start."""
    with serving() as server:
        mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "tokenizers" in mapped
    assert "libtorch" not in mapped


def follow_the_readme(url: str) -> None:
    """Its first requests, with curl and with the openai package, work as they are written."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    curl = re.search(r"curl -N http://127.0.0.1:8000(\S+) .*? -d '(.*?)'\n", readme, re.DOTALL)
    assert curl
    answer = httpx.post(url + curl[1], json=json.loads(curl[2]), timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    assert answer.text.rstrip().endswith("data: [DONE]")
    script = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert script
    program = script[1].replace("http://127.0.0.1:8000", url)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_localhost_is_reached_by_its_ipv4_address() -> None:
    from dynamo_serve.cli_serve import listen
    from dynamo_serve.config import ServerSection

    with listen(ServerSection(host="localhost", port=0)) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()


def test_a_signal_drains_and_new_requests_are_told_to_come_back() -> None:
    with serving("--set", "engine.fake_step_ms=10") as server:
        asking = httpx.stream("POST", server.url + "/v1/chat/completions", json=body(300))
        with asking as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not ready(server.url))
            refused = httpx.post(server.url + "/v1/chat/completions", json=body(1))
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) >= 1
            assert httpx.get(server.url + "/health").status_code == 200
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert server.process.wait(PATIENCE_S) == 0


def test_a_hangup_reloads_the_tenants_without_dropping_a_stream(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"

    def write(**keys: str) -> None:
        tenants = {name: {"keys": [f"sha256:{digest(key.encode())}"]} for name, key in keys.items()}
        file.write_text(json.dumps({"tenants": tenants}))

    def opens(url: str, key: str) -> bool:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(url + "/v1/models", headers=headers).status_code == 200

    write(acme="one")
    with serving("--tenants", str(file)) as server:
        headers = {"Authorization": "Bearer one", "X-Request-Id": "mine"}
        url = server.url + "/v1/chat/completions"
        with httpx.stream("POST", url, json=body(400), headers=headers) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            write(beta="two")
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda: opens(server.url, "two"))
            assert not opens(server.url, "one")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        file.write_text("tenants: {beta: {keys: [plain]}}")
        server.process.send_signal(signal.SIGHUP)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
        assert server.process.stderr is not None
        assert "tenants not reloaded" in (said := server.process.stderr.read())
        assert "plain" not in said


def test_tenants_are_checked_with_the_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants: {acme: {wieght: 2}}")
    code, _, err = run(capsys, "check-config", "--tenants", str(file))
    assert code == 2
    assert "tenants.acme.wieght: unknown key; did you mean weight?" in err
    code, out, _ = run(capsys, "check-config", "--print", "--set", "server.admin_keys=sesame")
    assert code == 0
    assert "sesame" not in out


def test_a_drain_that_takes_too_long_ends_streams_with_an_error() -> None:
    slow = ("--set", "engine.fake_step_ms=10")
    with serving("--set", "server.drain_timeout_s=0.05", *slow) as server:
        asking = httpx.stream("POST", server.url + "/v1/chat/completions", json=body(4000))
        with asking as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line.startswith("data: {")]
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["code"] == "server_shutdown"
        assert "send the request again" in error["message"]
        assert error["retry_after_s"] == 5.0
        assert server.process.wait(PATIENCE_S) == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with serving("--set", "engine.fake_step_ms=10") as server:
        asking = httpx.stream("POST", server.url + "/v1/chat/completions", json=body(4000))
        with asking as answer:
            lines = answer.iter_lines()  # held: letting go of it hangs up
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not ready(server.url))
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(PATIENCE_S) == 128 + signal.SIGTERM


def test_an_engine_that_cannot_start_is_one_line_and_exit_code_2() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("asks for a device that this machine has")
    command = [sys.executable, "-m", "dynamo_serve.cli", "serve", "--port", "0"]
    done = subprocess.run(
        [*command, "--device", "cuda", "--set", "log.level=error"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("dynamo-serve: ")
    assert "Traceback" not in done.stderr
