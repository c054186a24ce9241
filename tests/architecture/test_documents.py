"""What is written agrees with what is there."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from dynamo_serve import __version__, reference, settings
from tests.architecture.source import PACKAGE, ROOT, modules

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "bench/*.md", "triton_models/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def test_the_top_of_the_changelog_is_this_version() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__


def test_generated_files_are_current() -> None:
    assert reference.stale(ROOT) == [], "run: make reference"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(path.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}"


def anchors(path: Path) -> set[str]:
    """The anchors that headings get on the usual forges."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in HEADING.findall(path.read_text())
    }


@pytest.mark.parametrize("name", ["default", "cpu", "gpu"])
def test_shipped_settings_load_and_name_their_schema(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    loaded = settings.load(path)
    assert path.read_text().startswith(reference.SCHEMA_LINE)
    if name == "default":
        assert loaded.config == settings.load().config
        assert set(loaded.sources.values()) == {f"file {path}"}


def test_the_schema_has_every_key_and_no_other() -> None:
    schema = json.loads((ROOT / "configs" / "schema.json").read_text())
    sections = schema["properties"]
    keys = {f"{name}.{leaf}" for name in sections for leaf in sections[name]["properties"]}
    assert keys == set(settings.all_keys())


def test_alerts_and_dashboard_are_made_of_metrics_that_there_are() -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    known = set(re.findall(r"^\| `(dserve_\w+)`", page, re.MULTILINE))
    groups = yaml.safe_load((ROOT / "configs" / "alerts.yaml").read_text())["groups"]
    board = json.loads((ROOT / "configs" / "grafana.json").read_text())
    alerts = [rule["expr"] for group in groups for rule in group["rules"]]
    drawn = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    for asked in (alerts, drawn):
        names = set(re.findall(r"dserve_\w+", " ".join(asked).replace("_bucket", "")))
        assert len(names) > 10
        assert names - known == set()


def test_the_lock_pins_every_dependency_of_the_package_exactly() -> None:
    pinned = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[name.lower().replace("_", "-")] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=\[]", requirement)[0].lower() for requirement in wanted}
    assert names - pinned.keys() == set()
    assert pinned["torch"] == "2.13.0"


FOLDER_LINE = re.compile(r"^\*\*(`[^*]+`)\*\*$", re.MULTILINE)


def named_modules() -> dict[str, set[str]]:
    """Of each folder of the package, the modules that docs/architecture.md names."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    core, others = page.split("## The core's modules")[1].split("## The other modules")
    rest, _, _ = others.partition("## Vocabulary")
    _, *parts = FOLDER_LINE.split(rest)
    named = {"core": modules_in(core)}
    for folders, table in zip(parts[::2], parts[1::2], strict=True):
        for folder in re.findall(r"`(?:dynamo_serve/)?([^`]*)`", folders):
            named[folder.strip("/")] = modules_in(table)
    return named


def modules_in(table: str) -> set[str]:
    """What stands in the first column."""
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_every_module_is_in_the_tables_and_what_is_there_is_one() -> None:
    named = named_modules()
    there = {
        (str(path.parent.relative_to(PACKAGE)).removeprefix("."), path.stem)
        for path in modules()
        if path.stem != "__init__"
    }
    missing = {place for place in there if place[1] not in named.get(place[0], set())}
    assert not missing, "docs/architecture.md does not name them"
    assert set().union(*named.values()) <= {name for _, name in there}
