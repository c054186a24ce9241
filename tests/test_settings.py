"""Layers win in order, every value knows its source, a fault says what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_serve.config import Config
from dynamo_serve.errors import ConfigError
from dynamo_serve.settings import Given, all_keys, from_set, load, render, variable
from dynamo_serve.settings_key import BadValue, Key

KEYS = list(all_keys().values())
TLS = ["triton.tls=true"]
FORWARD = ["engine.kind=triton", "triton.endpoints=a:1,[::1]:2", "triton.model=m"]


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def fault(
    file: Path | None = None, environment: dict[str, str] | None = None, *assignments: str
) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, environment, map(from_set, assignments))
    return str(caught.value)


def test_without_any_layer_the_defaults_stand() -> None:
    loaded = load()
    assert loaded.config == Config()
    assert set(loaded.sources.values()) == {"default"}
    assert set(loaded.sources) == set(all_keys())


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "server: {port: 1, host: a, max_choices: 2}\n")
    environment = {"DYNAMO_SERVE_SERVER__PORT": "3", "DYNAMO_SERVE_SERVER__HOST": "b"}
    loaded = load(file, environment, [from_set("server.port=4")])
    server = loaded.config.server
    assert (server.port, server.host, server.max_choices) == (4, "b", 2)
    assert loaded.sources["server.port"] == "flag --set server.port"
    assert loaded.sources["server.host"] == "environment DYNAMO_SERVE_SERVER__HOST"
    assert loaded.sources["server.max_choices"] == f"file {file}"
    assert loaded.sources["server.ping_interval_s"] == "default"


def test_every_key_can_be_set_from_the_environment_by_its_printed_default() -> None:
    for key in KEYS:
        text = ",".join(key.default) if key.is_list else str(key.default)
        if key.kind is str or key.choices or text:
            loaded = load(None, {variable(key.path): text})
            assert loaded.config == Config()
            assert loaded.sources[key.path] == f"environment {variable(key.path)}"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("server.port=70000", "server.port = '70000': not allowed; allowed: a whole number from 0"),
        ("server.port=1.5", "allowed: a whole number from 0 to 65535"),
        ("server.port=", "server.port = '': not allowed"),
        ("cache.memory_fraction=nan", "allowed: a number from 0 to 0.98"),
        ("cache.memory_fraction=0.99", "allowed: a number from 0 to 0.98"),
        ("server.drain_timeout_s=inf", "allowed: a number of at least 0"),
        ("engine.process=maybe", "allowed: true, false"),
        ("engine.kind=vllm", "engine.kind = 'vllm': not allowed; allowed: local, fake"),
        ("engine.device=tpu", "allowed: text matching auto|cpu|cuda"),
        ("engine.device=cpux", "engine.device = 'cpux': not allowed"),
        ("server.host=a b", "allowed: text without spaces"),
        ("model.served_names=[1, 2]", "allowed: a list of texts"),
        ("model.served_names=[a", "allowed: a list of texts"),
        ("scheduler.max_prefil_tokens=1", "did you mean scheduler.max_prefill_tokens?"),
        ("model.port=1", "did you mean server.port?"),
        ("cache.blob=1", "allowed: page_size, num_pages"),
        ("scheduler.foo=1", "scheduler.foo: unknown key; allowed: max_prefill_tokens"),
        ("nonsense.zzz=1", "nonsense.zzz: unknown key; allowed: server.*, model.*"),
        ("server=1", "server: unknown key"),
        ("server.port", "--set server.port: no '='"),
    ],
)
def test_a_wrong_assignment_says_what_is_allowed(assignment: str, message: str) -> None:
    assert message in fault(None, None, assignment)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("model.lighter=int8", "model.quantization=int8"), "nothing lighter to switch to"),
        (("scheduler.ladder_pin=lighter_weights",), "set model.lighter"),
        (("scheduler.ladder_pin=restart_engine",), "not allowed"),
        (("model.lighter=none",), "allowed: "),
    ],
)
def test_what_the_ladder_cannot_do_is_refused(assignments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(flags=[from_set(assignment) for assignment in assignments])
    assert f"flag --set {assignments[0].partition('=')[0]}" in str(caught.value)


def test_all_faults_are_told_at_once() -> None:
    told = fault(None, None, "server.port=x", "engine.kind=y", "log.levle=info")
    assert [line.split()[0].rstrip(":") for line in told.splitlines()] == [
        "server.port",
        "engine.kind",
        "log.levle",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {port: '80'}", "server.port = '80': not allowed; allowed: a whole number"),
        ("server: {port: true}", "server.port = True: not allowed"),
        ("server: {port: null}", "server.port = None: not allowed"),
        ("server: {cors_origins: '*'}", "allowed: a list of texts"),
        ("model: {path: 7}", "model.path = 7: not allowed; allowed: text"),
        ("server: {prot: 80}", "did you mean server.port?"),
        ("sever: {port: 80}", "sever: unknown section; did you mean server?"),
        ("port: 80", "port: unknown section; did you mean server.port?"),
        ("? {a: 1}\n: 2", "not valid YAML"),
        ("server: 80", "server: got int; allowed: 'key: value' lines"),
        ("- server", "got list; allowed: sections"),
        ("server: [", "not valid YAML"),
        ("server: {port: 2020-13-01}", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ('server: {api_keys: ["\\ud800"]}', "allowed: a list of texts"),
        ('model: {path: "\\ud800"}', "allowed: text"),
        ("server: {port: 1, port: 2}", "'port' is given twice"),
        ("server: {port: 1}\nserver: {host: a}", "'server' is given twice"),
    ],
)
def test_a_wrong_file_says_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    assert message in fault(write(tmp_path, text))


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    assert "cannot read this file: No such file" in fault(tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in fault(binary)


def test_an_empty_file_and_an_empty_section_change_nothing(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")).config == Config()
    assert load(write(tmp_path, "server:\n  # port: 80\n")).config == Config()


def test_a_whole_number_in_a_file_is_a_number(tmp_path: Path) -> None:
    delay = load(write(tmp_path, "scheduler: {max_queue_delay_ms: 5}")).config.scheduler
    assert type(delay.max_queue_delay_ms) is float


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DYNAMO_SERVE_SERVER__PROT", "did you mean DYNAMO_SERVE_SERVER__PORT?"),
        ("DYNAMO_SERVE_SERVER_PORT", "did you mean DYNAMO_SERVE_SERVER__PORT?"),
        ("DYNAMO_SERVE_PORT", "unknown environment variable"),
    ],
)
def test_a_misspelt_variable_is_refused(name: str, message: str) -> None:
    assert message in fault(None, {name: "8000"})


def test_what_a_cluster_injects_for_a_service_of_our_name_is_left_alone() -> None:
    links = {
        "DYNAMO_SERVE_SERVICE_HOST": "10.0.0.1",
        "DYNAMO_SERVE_SERVICE_PORT": "8000",
        "DYNAMO_SERVE_SERVICE_PORT_HTTP": "8000",
        "DYNAMO_SERVE_PORT": "tcp://10.0.0.1:8000",
        "DYNAMO_SERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "DYNAMO_SERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "DYNAMO_SERVE_EDGE_SERVICE_HOST": "10.0.0.2",
    }
    assert load(None, links).config == Config()


def test_other_variables_are_none_of_ours() -> None:
    assert load(None, {"PATH": "x", "dynamo_serve_server__port": "1"}).config == Config()


@pytest.mark.parametrize("text", ["a,b", " a , b ,", "[a, b]", '["a", "b"]'])
def test_a_list_is_written_with_commas_or_brackets(text: str) -> None:
    assert load(None, None, [from_set(f"model.served_names={text}")]).config.model.served_names == (
        "a",
        "b",
    )


@pytest.mark.parametrize(("word", "meant"), [("true", True), ("ON", True), ("0", False)])
def test_a_switch_takes_the_usual_words(word: str, meant: bool) -> None:
    assert load(None, None, [from_set(f"log.requests={word}")]).config.log.requests is meant


def test_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    loaded = load(None, {"DYNAMO_SERVE_SERVER__API_KEYS": "hunter2,hunter3"})
    assert loaded.config.server.api_keys == ("hunter2", "hunter3")
    assert "hunter" not in render(loaded)
    assert '"****", "****"' in render(loaded)
    assert "hunter" not in fault(write(tmp_path, "server: {api_keys: hunter2}"))
    assert "hunter" not in fault(None, None, "server.api_keys=[hunter2")


def test_what_is_printed_can_be_loaded_again(tmp_path: Path) -> None:
    flags = [from_set("model.path=a # b"), from_set('server.cors_origins=["*"]')]
    loaded = load(None, {"DYNAMO_SERVE_CACHE__NUM_PAGES": "10"}, flags)
    assert load(write(tmp_path, render(loaded))).config == loaded.config
    assert "# environment DYNAMO_SERVE_CACHE__NUM_PAGES" in render(loaded)


def candidates(key: Key) -> Iterator[object]:
    yield from (None, True, -1, 0, 1, 0.5, 1e9, float("nan"), "", "x", "cpu", [], ["a"], [1], {})
    yield key.default
    yield from (bound for bound in (key.low, key.high) if bound is not None)
    yield from key.choices


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_an_accepted_value_has_the_declared_type_and_is_within_bounds(key: Key) -> None:
    for value in candidates(key):
        try:
            accepted = key.from_yaml(value)
        except BadValue as refused:
            assert "allowed: " in str(refused)
            continue
        if key.is_list:
            assert isinstance(accepted, tuple)
            assert all(isinstance(part, str) for part in accepted)
        elif key.choices:
            assert accepted in key.choices
        else:
            assert type(accepted) is key.kind
        if isinstance(accepted, int | float) and key.kind is not bool:
            assert key.low is None or accepted >= key.low
            assert key.high is None or accepted <= key.high


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_every_default_is_allowed_by_its_own_rules(key: Key) -> None:
    as_yaml = list(key.default) if key.is_list else key.default
    assert key.from_yaml(as_yaml) == key.default
    assert key.help.endswith(".")


@given(st.text(max_size=20))
def test_no_text_makes_anything_but_a_value_or_a_named_fault(text: str) -> None:
    for key in KEYS:
        flag = Given(key.path, text, "flag", is_text=True)
        try:
            load(None, None, [flag])
        except ConfigError as error:
            assert str(error).startswith(key.path)


def test_every_kind_of_field_is_one_the_loader_knows() -> None:
    simple = (str, int, float, bool, tuple[str, ...])
    for section in get_type_hints(Config).values():
        for kind in get_type_hints(section).values():
            assert kind in simple or getattr(kind, "__origin__", None) is Literal


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["triton.model=m"], "triton.model: nothing is forwarded; set engine.kind to triton"),
        (["engine.kind=triton", "triton.model=m"], "engine.kind = 'triton': set triton.endpoints"),
        ([*FORWARD, "triton.endpoints=a:0"], "allowed: ports from 1 to 65535"),
        ([*FORWARD, "triton.endpoints=a:1,a:1"], "one of them is there twice"),
        ([*FORWARD, "cache.page_size=32"], "cache.page_size: the Triton server decides that"),
        ([*FORWARD, "triton.dialect=odd"], "allowed: auto"),
        ([*FORWARD, "triton.metrics_endpoints=a:3"], "1 for 2 triton.endpoints: one for each"),
        ([*FORWARD, "triton.metrics_endpoints=a:3,a:3"], "one of them is there twice"),
        ([*FORWARD, "triton.tls_ca_file=ca.pem"], "nothing is encrypted; set triton.tls to true"),
        ([*FORWARD, *TLS, "triton.tls_cert_file=c"], "go together; set triton.tls_key_file, too"),
        ([*FORWARD, *TLS, "triton.tls_key_file=k"], "go together; set triton.tls_cert_file, too"),
    ],
)
def test_settings_of_triton_that_contradict_are_named(given: list[str], told: str) -> None:
    assert load(flags=map(from_set, FORWARD)).config.triton.endpoints == ("a:1", "[::1]:2")
    with pytest.raises(ConfigError, match=re.escape(told)):
        load(flags=map(from_set, given))
