"""The tenants file: what it becomes, and what it says about a fault without showing a key."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import yaml

from dynamo_serve.config import ServerSection
from dynamo_serve.core.tenant import CLASSES, Class, Quota, Tenant
from dynamo_serve.directory import Caller, changes, digest, summed_up
from dynamo_serve.errors import ConfigError
from dynamo_serve.tenants import CLASS, QUOTA, load, read
from tests.architecture.source import ROOT

KEYS = {name: f"key-of-{name}-with-enough-characters" for name in ("acme", "beta", "admin")}
HASHED = {name: f"sha256:{digest(key.encode())}" for name, key in KEYS.items()}


def write(folder: Path, text: str) -> Path:
    path = folder / "tenants.yaml"
    path.write_text(text)
    return path


def faults(folder: Path, text: str) -> list[str]:
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    lines = str(caught.value).splitlines()
    assert all(line.endswith(f" (from file {path})") for line in lines)
    return [line.removesuffix(f" (from file {path})") for line in lines]


def test_everything_that_can_be_said_arrives_in_its_unit(tmp_path: Path) -> None:
    text = f"""
classes:
  chatty: {{rank: 4, ttft_ms: 250, itl_ms: 40, max_queue_delay_ms: 2, deadline_ms: 60000,
           strict: true}}
tenants:
  acme:
    keys: ["{HASHED["acme"]}"]
    class: chatty
    weight: 3
    salt: shared
    quota: {{live_sequences: 1, pages_guaranteed: 2, pages_burst: 3, tokens_per_minute: 4,
            requests_per_minute: 5, queue_length: 6}}
admin_keys: ["{HASHED["admin"]}"]
"""
    directory = read(write(tmp_path, text))
    classes = directory.tenancy.classes
    assert classes == {**CLASSES, "chatty": Class("chatty", 4, 0.25, 0.04, 0.002, 60.0, True)}
    quota = Quota(
        live_sequences=1,
        pages_guaranteed=2,
        pages_burst=3,
        tokens_per_minute=4.0,
        requests_per_minute=5.0,
        queue_length=6,
    )
    assert directory.tenancy.tenants == {"acme": Tenant("acme", 3.0, "chatty", quota)}
    assert directory.callers == {digest(KEYS["acme"].encode()): Caller("acme", "shared")}
    assert directory.admins == {digest(KEYS["admin"].encode())}
    assert not directory.is_open


def test_every_field_of_a_class_and_a_quota_can_be_said() -> None:
    assert {rule.field for rule in CLASS.values()} == set(Class.__slots__) - {"name"}
    assert {rule.field for rule in QUOTA.values()} == set(Quota.__slots__)


def test_what_is_not_said_is_as_built_in(tmp_path: Path) -> None:
    text = "tenants: {acme: }\nclasses: {interactive: {ttft_ms: 500, itl_ms: null}}\n"
    directory = read(write(tmp_path, text))
    assert directory.tenancy.tenants == {"acme": Tenant("acme")}
    assert directory.tenancy.classes == {
        **CLASSES,
        "interactive": replace(CLASSES["interactive"], ttft=0.5, itl=inf),
    }


def test_tenants_share_prefixes_only_if_they_share_a_salt(tmp_path: Path) -> None:
    text = yaml.safe_dump({"tenants": {name: {"keys": [HASHED[name]]} for name in KEYS}})
    salts = [caller.salt for caller in read(write(tmp_path, text)).callers.values()]
    assert sorted(salts) == sorted(KEYS)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("tenants: {a: {wieght: 1}}", "tenants.a.wieght: unknown key; did you mean weight?"),
        ("tenant: {a: }", "tenant: unknown key; did you mean tenants?"),
        ("tenants: {a: {quota: {pages: 1}}}", "tenants.a.quota.pages: unknown key;"),
        ("tenants: {a: {weight: 0}}", "tenants.a.weight = 0: not allowed; allowed: a number"),
        ("tenants: {a: {weight: null}}", "tenants.a.weight = None: not allowed;"),
        (
            "tenants: {a: {quota: {live_sequences: 0}}}",
            "tenants.a.quota.live_sequences = 0: not allowed; "
            "allowed: a whole number of at least 1, or null",
        ),
        ("tenants: {a: {class: gold}}", "tenants.a.class = 'gold': no such class; allowed: inter"),
        ("tenants: {a: {quota: 3}}", "tenants.a.quota: not a mapping;"),
        (
            "tenants: {a: {quota: {pages_guaranteed: 9, pages_burst: 8}}}",
            "tenants.a.quota.pages_burst = 8: not allowed; allowed: at least pages_guaranteed, 9",
        ),
        ("tenants: {'a b': }", "tenants: 'a b' is no name;"),
        ("tenants: {7: }", "tenants: 7 is no name;"),
        ("tenants: [a]", "tenants: not a mapping;"),
        ("- a", "the file: not a mapping;"),
        ("admin_keys: []", "tenants: none; allowed: at least one"),
        ("tenants: {a: }\nclasses: {x: {ttft_ms: 0}}", "classes.x.ttft_ms = 0: not allowed;"),
        ("tenants: {a: }\nclasses: {x: {strict: 1}}", "classes.x.strict = 1: not allowed;"),
        ("tenants: {a: {keys: sesame}}", "tenants.a.keys: not a list; keys are stored hashed"),
        ("tenants: {a: {keys: [sesame]}}", "tenants.a.keys[0]: not a hash; keys are stored hashed"),
        ("tenants: {a: }\nadmin_keys: [sesame]", "admin_keys[0]: not a hash; keys are stored"),
        ("tenants: {a: {keys: ['sha256:sesame']}}", "tenants.a.keys[0]: not a hash;"),
    ],
)
def test_a_fault_names_its_path_and_what_is_allowed(text: str, fault: str, tmp_path: Path) -> None:
    first = faults(tmp_path, text)[0]
    assert first.startswith(fault)
    assert "sesame" not in first


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = "tenants: {a: {weight: -1, class: gold}, b: {keys: [x]}}\nclasses: {x: {rank: -1}}"
    assert len(faults(tmp_path, text)) == 4


def test_a_key_has_one_owner(tmp_path: Path) -> None:
    key, admin = HASHED["acme"], HASHED["admin"]
    text = f"""
tenants: {{a: {{keys: ["{key}"]}}, b: {{keys: ["{key}", "{admin}"]}}}}
admin_keys: ["{admin}"]
"""
    assert faults(tmp_path, text) == [
        "tenants.b.keys[0]: the same key as tenants.a.keys[0]; a key has one owner",
        "tenants.b.keys[1]: the same key as admin_keys[0]; a key has one owner",
    ]


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read this file"):
        read(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="'a' is given twice"):
        read(write(tmp_path, "tenants: {a: , a: }"))


def test_without_a_file_everybody_is_the_one_tenant() -> None:
    open_to_all = load(ServerSection(admin_keys=("admin",)))
    assert open_to_all.is_open and open_to_all.admins == {digest(b"admin")}
    with_keys = load(ServerSection(api_keys=("one", "two")))
    assert not with_keys.is_open
    assert set(with_keys.callers.values()) == {Caller("default", "")}
    assert list(with_keys.tenancy.tenants) == ["default"]


def test_keys_are_said_in_one_place_only(tmp_path: Path) -> None:
    file = str(write(tmp_path, f'tenants: {{a: {{keys: ["{HASHED["acme"]}"]}}}}'))
    with pytest.raises(ConfigError, match="not allowed with server"):
        load(ServerSection(api_keys=("x",), tenants_file=file))
    with pytest.raises(ConfigError, match="one of them is in server"):
        load(ServerSection(api_keys=("x",), admin_keys=("x",)))
    with pytest.raises(ConfigError, match="the same key as server"):
        load(ServerSection(admin_keys=(KEYS["acme"],), tenants_file=file))
    both = load(ServerSection(admin_keys=(KEYS["admin"],), tenants_file=file))
    assert both.admins == {digest(KEYS["admin"].encode())}


def test_a_tenant_without_keys_opens_nothing(tmp_path: Path) -> None:
    assert not read(write(tmp_path, "tenants: {a: }")).is_open


def test_a_reload_tells_what_changed(tmp_path: Path) -> None:
    before = read(
        write(
            tmp_path, f"tenants: {{a: , b: {{keys: ['{HASHED['beta']}']}}, c: , d: {{weight: 2}}}}"
        )
    )
    after = read(
        write(
            tmp_path,
            "tenants: {a: , b: , d: {weight: 3}, e: }\nclasses: {batch: {ttft_ms: 9}, x: }",
        )
    )
    assert changes(before, after) == {
        "tenants": {"added": ["e"], "removed": ["c"], "changed": ["b", "d"]},
        "classes": {"added": ["x"], "removed": [], "changed": ["batch"]},
    }
    assert changes(after, after)["tenants"] == {"added": [], "removed": [], "changed": []}
    assert summed_up(changes(before, after)) == (
        "tenants added: e; tenants removed: c; tenants changed: b, d; "
        "classes added: x; classes changed: batch"
    )
    assert summed_up(changes(after, after)) == "no tenant or class has changed"


def test_nothing_that_is_printed_shows_a_hash(tmp_path: Path) -> None:
    text = yaml.safe_dump({"tenants": {"a": {"keys": [HASHED["acme"]]}}})
    assert digest(KEYS["acme"].encode()) not in repr(read(write(tmp_path, text)))


@pytest.mark.parametrize("text", ["tenants: {a: {keys: [sesame", "a: sesame\na: sesame"])
def test_a_file_that_is_not_yaml_is_not_quoted(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line [12]") as caught:
        read(write(tmp_path, text))
    assert "sesame" not in str(caught.value)


def test_the_example_is_valid_and_its_keys_are_those_it_tells() -> None:
    directory = read(ROOT / "configs" / "tenants.yaml")
    assert list(directory.tenancy.tenants) == ["web", "research"]
    assert directory.callers[digest(b"example-key-of-web-0001")].tenant == "web"
    assert directory.callers[digest(b"example-key-of-research-0001")].tenant == "research"
    assert directory.admins == {digest(b"example-key-of-admin-0001")}
    for name in ("interactive", "standard"):
        assert directory.tenancy.classes[name] == CLASSES[name]
