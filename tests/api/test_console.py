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
from dynamo_serve.core.journal import Reason
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.api.test_tenants import tenants
from tests.patience import PATIENCE_S

KEY = "key-of-admin-with-enough-characters"
NUMBERS, PAGE = (files("dynamo_serve.api") / f"console{what}.js" for what in ("_numbers", ""))


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
    page, _ = _page("<script>alert(1)</script>, /*script*/, /*style*/, {models}")
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page
    assert page.count("/*script*/, /*style*/, {models}</span>") == 1


def test_no_text_is_ever_taken_for_markup() -> None:
    script = NUMBERS.read_text() + PAGE.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def computed(expression: str, **given: Any) -> Any:
    """What the page's functions make of `given`, in a JavaScript of its own."""
    if (node := shutil.which("node")) is None:
        pytest.skip("there is no node to run the page's script")
    code = (
        f"const c = require({json.dumps(str(NUMBERS))});"
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


def looked(at: float, output: int, **more: int) -> dict[str, Any]:
    return {"at": at, "tenants": {"a": {"output": output, "prefill": 0, "saved": 0, **more}}}


def test_what_an_engine_before_this_one_counted_is_forgotten() -> None:
    looks = [looked(1, 40), looked(2, 50)]
    assert (
        len(computed("c.remembered(given.looks, given.next)", looks=looks, next=looked(3, 60))) == 3
    )
    anew = looked(3, 8, saved=90)  # one count fell: all began at 0
    assert computed("c.remembered(given.looks, given.next)", looks=looks, next=anew) == [anew]


def test_a_tab_that_was_hidden_for_an_hour_tells_of_the_last_minute() -> None:
    state = {"pages": {"used": 0, "cached": 0, "total": 1}, "num_running": 0, "num_waiting": 0}
    looks: list[Any] = []
    for at, output, late in ((0, 0, 0), (1, 10, 0), (3601, 400_000, 100), (3603, 400_020, 100)):
        promises = {"interactive": {"ttft_kept": output // 10, "ttft_late": late}}
        used = {"output_tokens": output, "prefill_tokens": 0, "saved_tokens": 0, "cost_seconds": 0}
        costs = {"tenants": {"a": {**used, "promises": promises}}}
        looks = computed(
            "c.remembered(given.looks, c.sample(given.state, given.costs, given.at))",
            looks=looks,
            state=state,
            costs=costs,
            at=at,
        )
    tiles = {caption: value for caption, value, _ in computed("c.tiles(given.looks)", looks=looks)}
    assert tiles["output tokens/s"] == "10"
    assert tiles["first tokens in time, last minute"] == "100 %"


def test_who_was_refused_or_never_served_was_not_served_in_time() -> None:
    state = {"pages": {"used": 0, "cached": 0, "total": 1}, "num_running": 0, "num_waiting": 0}
    used = {"output_tokens": 1, "prefill_tokens": 0, "saved_tokens": 0, "cost_seconds": 0}
    counts = {"ttft_kept": 1, "ttft_late": 1, "ttft_refused": 4, "ttft_never": 4}
    counts |= {"itl_kept": 1, "itl_late": 0, "itl_paused": 3}
    costs, none = (
        {"tenants": {"a": {**used, "promises": promises}}}
        for promises in ({"interactive": counts}, {})
    )
    told = computed(
        "c.tiles([c.sample(given.state, given.none, 1), c.sample(given.state, given.costs, 2)])",
        state=state,
        costs=costs,
        none=none,
    )
    tiles = {caption: value for caption, value, _ in told}
    assert tiles["first tokens in time, last minute"] == "10 %"
    assert tiles["further tokens in time, last minute"] == "25 %"


def test_what_requests_wait_for_is_counted_and_said() -> None:
    waiting = [{"waits_for": why} for why in ("slots", "pages", "pages", "odd")]
    told = computed("c.reasons(given.waiting, 9)", waiting=waiting)
    assert told.startswith("Of the first 4 of 9: 2 for pages (too few KV pages are free), 1 for ")
    assert told.endswith("1 for odd.")


def test_the_reasons_that_have_words_are_all_that_there_are_to_wait() -> None:
    text = Path(str(files("dynamo_serve") / "core" / "journal.py")).read_text()
    block = text.partition("# defer")[2].partition("# chunk")[0]
    words = set(computed("Object.keys(c.WHY)"))
    assert set(re.findall(r'= "(\w+)"', block)) <= words
    preempted = {"over_share", "guarantee", "out_of_pages", "not_restored"}
    heads = {"token_cap", "step_time", "itl_target", "shrink_chunks"}
    assert preempted | heads | {"widen_window", "cap_batch", "spill"} <= words
    assert words <= {reason.value for reason in Reason}
