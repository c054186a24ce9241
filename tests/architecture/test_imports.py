"""The import law: everything points at core, and core imports only the standard library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import source
from tests.patience import PATIENCE_S

# What the parts of the package may import: parts of the package, and libraries besides the
# standard one. A name ending in a dot allows everything below it.
LAW: dict[str, tuple[str, ...]] = {
    "dynamo_serve": (),
    "dynamo_serve.errors": (),
    "dynamo_serve.config": (
        *("config_cache", "config_field", "config_responses", "config_structured"),
        "config_triton",
    ),
    "dynamo_serve.config_responses": ("config_field",),
    "dynamo_serve.config_structured": ("config_field",),
    "dynamo_serve.grammars": ("core.", "llguidance."),
    "dynamo_serve.grammar_schema": (),
    "dynamo_serve.grammar_process": ("core.", "grammars", "grammar_schema", "llguidance."),
    "dynamo_serve.fair_queue": (),
    "dynamo_serve.preparing": ("errors",),
    "dynamo_serve.turns": ("fair_queue",),
    "dynamo_serve.grammar_helper": ("errors", "process"),
    "dynamo_serve.grammar_checker": (
        *("config", "core.", "errors", "grammar_helper", "turns", "grammars"),
    ),
    "dynamo_serve.config_cache": ("config_field",),
    "dynamo_serve.config_field": (),
    "dynamo_serve.config_triton": ("config_field",),
    "dynamo_serve.bundled.": (),
    "dynamo_serve.core.": ("dynamo_serve.core.",),
    "dynamo_serve.engines.triton_server.": (
        *("config", "core.", "endpoint_counts", "engines.triton_server.", "errors", "text."),
        *("grpc.", "tritonclient."),
    ),
    "dynamo_serve.engines.": (
        *("cgroups", "config", "core.", "engines.", "errors", "fair_queue", "grammars", "native."),
        *("llguidance.", "safetensors.", "torch.", "transformers.", "triton."),
    ),
    "dynamo_serve.native.": ("native.", "torch."),
    "dynamo_serve.text.": ("core.", "errors", "jinja2.", "text.", "tokenizers.", "transformers."),
    "dynamo_serve.wire": ("core.", "msgpack."),
    "dynamo_serve.garbage": (),
    "dynamo_serve.json_lines": ("errors",),
    "dynamo_serve.trace": ("errors", "json_lines"),
    "dynamo_serve.bench.": (
        *("", "bench.", "cgroups", "core.", "errors", "json_lines", "trace"),
        *("httptools.", "tokenizers.", "yaml."),
    ),
    "dynamo_serve.simulate.": (
        *("", "bench.latency", "bench.record", "bench.spread", "config", "core.", "errors"),
        *("json_lines", "scheduling", "settings", "simulate."),
        *("tenants", "trace"),
    ),
    "dynamo_serve.cli_simulate": ("bench.record", "errors", "settings", "simulate."),
    "dynamo_serve.kv_events": ("config", "core.", "errors", "msgpack.", "zmq."),
    "dynamo_serve.building": ("config", "core.", "engines.", "errors", "kv_events", "scheduling"),
    "dynamo_serve.scheduling": ("config", "core."),
    "dynamo_serve.worker": ("building", "config", "core.", "errors", "garbage", "wire"),
    "dynamo_serve.cgroups": (),
    "dynamo_serve.process": ("cgroups",),
    "dynamo_serve.start": ("process",),
    "dynamo_serve.template": ("engines.", "start", "worker", "numpy.", "transformers."),
    "dynamo_serve.link": ("building", "config", "core.", "errors", "process", "start", "wire"),
    "dynamo_serve.thread_link": ("building", "config", "core.", "link"),
    "dynamo_serve.ladder": ("config", "core.", "errors"),
    "dynamo_serve.stall": (),
    "dynamo_serve.supervisor": (
        *("building", "config", "core.", "errors", "ladder", "link", "stall", "start"),
        "thread_link",
    ),
    "dynamo_serve.timers": (),
    "dynamo_serve.inbox": ("core.", "errors"),
    "dynamo_serve.delivery": ("core.", "errors", "inbox"),
    "dynamo_serve.deliveries": (
        *("core.", "delivery", "errors", "inbox", "link", "observer", "supervisor", "timers"),
    ),
    "dynamo_serve.observer": ("core.", "delivery", "errors"),
    "dynamo_serve.recording": (
        *("", "config", "core.", "delivery", "errors", "observer", "recording_files"),
        *("recording_lines", "trace"),
    ),
    "dynamo_serve.recording_files": ("core.", "errors"),
    "dynamo_serve.recording_lines": (
        *("config", "core.", "delivery", "errors", "inbox", "recording_files", "trace"),
    ),
    "dynamo_serve.questions": ("core.", "errors"),
    "dynamo_serve.fits": ("config", "core.", "errors"),
    "dynamo_serve.service": (
        *("building", "config", "core.", "deliveries", "delivery", "errors", "fits", "inbox"),
        *("link", "observer", "prefixes", "preparing", "questions", "supervisor", "timers"),
    ),
    "dynamo_serve.prefixes": ("core.", "errors", "supervisor", "timers"),
    "dynamo_serve.metrics": (
        *("core.", "errors", "metrics_declared", "metrics_endpoints", "metrics_histogram"),
        *("metrics_ladder", "metrics_scraped", "metrics_tenants", "metrics_tiers", "observer"),
        *("scrape", "prometheus_client."),
    ),
    "dynamo_serve.metrics_endpoints": ("endpoint_counts",),
    "dynamo_serve.endpoint_counts": ("metrics_histogram",),
    "dynamo_serve.metrics_scraped": (),
    "dynamo_serve.scrape": ("metrics_scraped", "httpx."),
    "dynamo_serve.metrics_declared": ("core.",),
    "dynamo_serve.metrics_histogram": (),
    "dynamo_serve.metrics_ladder": ("core.",),
    "dynamo_serve.metrics_tiers": ("core.",),
    "dynamo_serve.metrics_tenants": ("core.", "prometheus_client."),
    "dynamo_serve.api.gate": ("errors",),
    "dynamo_serve.api.refusal": ("api.", "errors", "uvicorn."),
    "dynamo_serve.api.unframed": ("starlette.", "uvicorn."),
    "dynamo_serve.api.protocol": ("api.", "config", "errors", "httptools.", "uvicorn."),
    "dynamo_serve.api.": (
        *("", "api.", "config", "core.", "delivery", "directory", "errors", "grammar_checker"),
        *("grammar_helper", "grammars", "prefixes", "preparing", "turns"),
        *("service", "shared", "tenants", "text.", "fastapi.", "starlette.", "pydantic."),
    ),
    "dynamo_serve.settings_key": ("yaml.",),
    "dynamo_serve.settings": ("config", "errors", "settings_key", "settings_triton", "yaml."),
    "dynamo_serve.settings_triton": (),
    "dynamo_serve.directory": ("core.",),
    "dynamo_serve.shared": ("errors", "settings"),
    "dynamo_serve.tenants": (
        *("config", "core.", "directory", "errors", "settings", "settings_key"),
    ),
    "dynamo_serve.cli_keys": ("directory", "errors", "tenants"),
    "dynamo_serve.chat": ("errors", "httpx."),
    "dynamo_serve.line": ("wire",),
    "dynamo_serve.handover": ("config", "errors", "line", "wire"),
    "dynamo_serve.luggage": ("api.", "core.", "delivery", "text.dialect", "wire"),
    "dynamo_serve.moving": (
        *("api.", "core.", "deliveries", "delivery", "errors", "line", "luggage", "observer"),
        "service",
    ),
    "dynamo_serve.succession": (
        *("api.", "handover", "line", "luggage", "moving", "observer", "service", "text."),
        "uvicorn.",
    ),
    "dynamo_serve.cli_progress": (),
    "dynamo_serve.cli_model": ("bundled.", "config", "core.", "errors", "hub", "text."),
    "dynamo_serve.hub": ("errors", "start", "huggingface_hub."),
    "dynamo_serve.open_files": (),
    "dynamo_serve.http_server": ("api.", "config", "open_files", "starlette.", "uvicorn."),
    "dynamo_serve.cli_replay": ("bench.", "cli_progress", "errors", "settings", "trace"),
    "dynamo_serve.__main__": ("cli",),
    "dynamo_serve.cli_parser": ("", "settings"),
    "dynamo_serve.cli": (
        *(
            "",
            "errors",
            "settings",
            "chat",
            "cli_bench_parser",
            "cli_keys",
            "cli_parser",
            "cli_replay",
        ),
        *("cli_serve", "cli_simulate_parser", "cli_triton", "shared", "tenants"),
        "text.without_torch",
    ),
    "dynamo_serve.cli_triton": ("config", "engines.triton_server."),
    "dynamo_serve.cli_simulate_parser": ("cli_simulate",),
    "dynamo_serve.cli_bench_parser": ("cli_bench_flags", "cli_report_flags"),
    "dynamo_serve.cli_report_flags": ("cli_bench_flags", "cli_compare", "cli_report"),
    "dynamo_serve.cli_compare": (
        *("", "bench.", "cli_bench", "cli_progress", "cli_report", "errors", "settings"),
    ),
    "dynamo_serve.cli_report": ("bench.", "errors"),
    "dynamo_serve.cli_bench_flags": ("cli_bench",),
    "dynamo_serve.cli_bench": ("bench.", "cli_bench_flags", "cli_progress", "errors", "yaml."),
    "dynamo_serve.cli_metrics": ("", "config", "metrics", "observer", "scrape"),
    "dynamo_serve.cli_serve": (
        *(
            "",
            "api.",
            "cli_metrics",
            "cli_model",
            "cli_progress",
            "config",
            "directory",
            "errors",
            "fits",
        ),
        *(
            "garbage",
            "handover",
            "observer",
            "http_server",
            "recording",
            "service",
            "succession",
        ),
    ),
    "dynamo_serve.reference_tables": (),
    "dynamo_serve.reference_http": ("", "api.", "config", "errors", "reference_tables"),
    "dynamo_serve.reference": (
        *("", "cli", "config", "metrics_declared", "metrics_histogram", "reference_http"),
        *("reference_tables", "settings", "settings_key"),
    ),
}


def covers(rule: str, module: str) -> bool:
    if rule.endswith("."):
        return module == rule[:-1] or module.startswith(rule)
    return module == rule


def absolute(allowed: str) -> str:
    """Short names in the law are parts of this package unless they are libraries."""
    inside = ("dynamo_serve." + allowed) if allowed else "dynamo_serve"
    path = source.ROOT.joinpath(*inside.rstrip(".").split("."))
    return inside if path.is_dir() or path.with_suffix(".py").is_file() else allowed


def allowed_for(module: str) -> list[str] | None:
    for rule, allowed in LAW.items():
        if covers(rule, module):
            return [absolute(name) for name in allowed]
    return None


def breaches(path: Path) -> list[str]:
    allowed = allowed_for(source.dotted(path))
    assert allowed is not None, f"{source.dotted(path)} has no place in LAW"
    return [
        f"{source.dotted(path)} imports {name}"
        for name in sorted(source.imports(path))
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(covers(rule, name) for rule in allowed)
    ]


def test_no_module_imports_what_the_law_does_not_allow() -> None:
    assert [breach for path in source.modules() for breach in breaches(path)] == []


def test_core_stands_alone() -> None:
    # Said twice on purpose: this one holds even if somebody edits the table above.
    for path in (source.PACKAGE / "core").rglob("*.py"):
        for name in source.imports(path):
            assert name.startswith("dynamo_serve.core") or (
                name.split(".")[0] in sys.stdlib_module_names
            ), f"{path.name} imports {name}"


def test_the_law_names_only_modules_that_exist() -> None:
    for rule in LAW:
        path = source.ROOT.joinpath(*rule.rstrip(".").split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), rule


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("import torch", "torch"),
        ("from torch import nn", "torch"),
        ("if TYPE_CHECKING:\n    import torch.nn", "torch.nn"),
        ("def f():\n    from dynamo_serve import service", "dynamo_serve.service"),
        ("from .. import service", "dynamo_serve.service"),
        ("from ..service import Service", "dynamo_serve.service"),
        ("from . import loop", "dynamo_serve.core.loop"),
    ],
)
def test_every_way_to_import_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str, name: str
) -> None:
    monkeypatch.setattr(source, "ROOT", tmp_path)
    core = tmp_path / "dynamo_serve" / "core"
    core.mkdir(parents=True)
    for module in ("service.py", "core/loop.py"):
        (tmp_path / "dynamo_serve" / module).touch()
    path = core / "probe.py"
    path.write_text(statement)
    assert source.imports(path) == {name}


@pytest.mark.parametrize(
    ("module", "statement", "is_allowed"),
    [
        ("core/probe.py", "import torch", False),
        ("core/probe.py", "from dynamo_serve.errors import ConfigError", False),
        ("core/probe.py", "from dynamo_serve.core.batch import Batch", True),
        ("text/probe.py", "import fastapi", False),
        ("api/probe.py", "import torch", False),
        ("api/probe.py", "from dynamo_serve.engines import fake", False),
        ("engines/local/probe.py", "import torch.nn", True),
        ("engines/probe.py", "from dynamo_serve import service", False),
        ("engines/probe.py", "import torchvision", False),
    ],
)
def test_the_law_tells_right_from_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, statement: str, is_allowed: bool
) -> None:
    (tmp_path / "dynamo_serve").symlink_to(source.PACKAGE)
    allowed = allowed_for(f"dynamo_serve.{module.removesuffix('.py').replace('/', '.')}")
    monkeypatch.setattr(source, "ROOT", tmp_path)
    path = tmp_path / "probe.py"
    path.write_text(statement)
    (name,) = source.imports(path)
    assert allowed is not None
    assert any(covers(rule, name) for rule in allowed) is is_allowed


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("dynamo_serve.core.scheduler", ("torch", "fastapi", "prometheus_client", "yaml")),
        ("dynamo_serve.service", ("torch", "transformers", "fastapi", "prometheus_client")),
        ("dynamo_serve.cli", ("torch", "transformers", "fastapi", "httpx")),
        ("dynamo_serve.engines.fake", ("torch", "transformers", "fastapi")),
    ],
)
def test_what_should_be_light_loads_nothing_heavy(module: str, heavy: tuple[str, ...]) -> None:
    probe = f"import sys, {module}; print(*(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=source.ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout.split() == []
