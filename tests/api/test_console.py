"""The page for operators: what browsers are told of it, and what its script makes of answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from base64 import b64encode
from collections.abc import Generator
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_serve.api.console import _page
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.api.test_tenants import tenants
from tests.patience import PATIENCE_S

KEY = "key-of-admin-with-enough-characters"
SCRIPT = files("dynamo_serve.api") / "console.js"


@pytest.fixture(scope="module")
def url(
    model_folder: str, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Generator[str]:
    file = tmp_path_factory.mktemp("console") / "tenants.yaml"
    file.write_text(json.dumps(tenants(weight=2, **{"class": "interactive"})))
    settings = config(tenants_file=str(file))
    with serving(Service(settings, model_path=model_folder), tokenizer, settings) as base:
        yield base


def test_anybody_gets_the_page_and_its_script_is_the_only_one_that_runs(url: str) -> None:
    answer = httpx.get(f"{url}/console")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "tiny, tiny-alias" in answer.text
    elsewhere = set(re.findall(r"https?://[^\"'`\s]+", answer.text))
    assert elsewhere == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_the_name_of_a_model_is_no_markup() -> None:
    page, _ = _page("<script>alert(1)</script>")
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page


def test_no_text_is_ever_taken_for_markup() -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", SCRIPT.read_text()
    )


def computed(expression: str, **given: Any) -> Any:
    """What the page's functions make of `given`, in a JavaScript of its own."""
    if (node := shutil.which("node")) is None:
        pytest.skip("there is no node to run the page's script")
    code = (
        f"const c = require({json.dumps(str(SCRIPT))});"
        f"const given = JSON.parse(require('fs').readFileSync(0));"
        f"console.log(JSON.stringify({expression}))"
    )
    ran = subprocess.run(
        [node, "-e", code],
        check=False,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def asked(url: str) -> dict[str, Any]:
    head = {"Authorization": f"Bearer {KEY}"}
    return {
        name: httpx.get(f"{url}/admin/{name}", headers=head).raise_for_status().json()
        for name in ("state", "costs", "controller", "incidents")
    }


def test_a_real_server_is_shown_as_it_is(url: str) -> None:
    before = asked(url)
    for key, count in (("acme", 40), ("beta", 20)):
        head = {"Authorization": f"Bearer key-of-{key}-with-enough-characters"}
        body = {"prompt": [1, 2, 3, 4], "max_tokens": count, "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=body, headers=head).raise_for_status()
    until = time.monotonic() + PATIENCE_S
    while (after := asked(url))["state"]["num_running"]:
        assert time.monotonic() < until
    looks = (
        "[c.sample(given.b.state, given.b.costs, 10), c.sample(given.a.state, given.a.costs, 12)]"
    )
    made = computed(
        f"{{tiles: c.tiles({looks}), rows: c.tenantRows(given.a.state, {looks}),"
        "told: given.a.state.journal.map(c.details), why: c.reasons(given.a.state.waiting, 0)}",
        a=after,
        b=before,
    )
    tiles = {caption: value for caption, value, _ in made["tiles"]}
    assert tiles["output tokens/s"] == "30"  # 60 tokens in 2 seconds
    assert tiles["running"] == tiles["waiting"] == "0"
    counts = [c for t in after["costs"]["tenants"].values() for c in t["promises"].values()]
    kept, late = (sum(c[f"ttft_{how}"] for c in counts) for how in ("kept", "late"))
    assert kept + late == 2  # a busy machine may be late, and the page says so
    shown = tiles["first tokens in time, last minute"].removesuffix(" %")
    assert float(shown) == pytest.approx(100 * kept / (kept + late), rel=0.01)
    rows = {row[0]: row for row in made["rows"]}
    assert (rows["acme"][1:4], rows["acme"][6]) == (["interactive", 2, 0], "20")
    assert (rows["beta"][2], rows["beta"][6]) == (1, "10")
    assert (rows["acme"][8], rows["beta"][8]) == ("66.7 %", "33.3 %")
    assert made["why"] == "Nobody waits."
    assert any("output_tokens 40" in told for told in made["told"])


def test_counts_of_an_engine_that_came_anew_are_not_below_zero() -> None:
    def used(output: int) -> dict[str, Any]:
        return {"tenants": {"a": {"output": output}}, "at": output}

    assert computed("c.grown(given.one, given.two, 'a', 'output')", one=used(50), two=used(8)) == 8
    assert computed("c.grown(null, given.two, 'a', 'output')", two=used(8)) == 8


def test_what_requests_wait_for_is_counted_and_said() -> None:
    waiting = [{"waits_for": why} for why in ("slots", "pages", "pages", "odd")]
    told = computed("c.reasons(given.waiting, 9)", waiting=waiting)
    assert told.startswith("Of the first 4 of 9: 2 for pages (too few KV pages are free), 1 for ")
    assert told.endswith("1 for odd.")


def test_every_reason_to_wait_has_words() -> None:
    text = Path(str(files("dynamo_serve") / "core" / "journal.py")).read_text()
    block = text.partition("# defer")[2].partition("# chunk")[0]
    names = set(re.findall(r'= "(\w+)"', block))
    assert names and names <= set(computed("Object.keys(c.WHY)"))
