"""docs/clients.md names the versions that are installed here."""

from __future__ import annotations

import json
import re

from scripts.clients import LISTS
from tests.architecture.source import ROOT

ASIDE = ("numpy", "zod")  # asked for by others of them, not clients


def test_the_versions_of_the_table_are_those_of_the_lists() -> None:
    document = (ROOT / "docs" / "clients.md").read_text()
    pairs = list(json.loads((LISTS / "package.json").read_text())["dependencies"].items())
    for name in ("requirements.lock", "requirements-openai-2.lock"):
        first = (LISTS / name).read_text().split("\n\n")[0]
        pairs += re.findall(r"^([\w.-]+)==(\S+)$", first, re.MULTILINE)
    assert len(pairs) > 10
    for name, version in pairs:
        named = re.search(rf"`{name}`[^|]*\b{re.escape(version)}\b", document)
        assert name in ASIDE or named, f"docs/clients.md does not say {name} {version}"
