"""Traces and runs: what is written is read again, and a fault names its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_serve import trace
from dynamo_serve.bench import record
from dynamo_serve.bench.record import Record, Run, Sample
from dynamo_serve.errors import ConfigError
from dynamo_serve.trace import Arrival, Header, Line, Step

LINES: list[Line] = [
    Arrival(0.5, 40, 9, 16, pages=((0, 2),), output_pages=((7, 1),), tenant="shop", gone_at=2.5),
    Step(0.75, 0.012, (3, 12.5, 2, 64, 40, 0)),
    Arrival(1.5, 20, 0, 16, ended="refused", status=429, retry_after=3.0),
]


def written(path: Path) -> Path:
    with trace.open_trace(path, "w") as file:
        file.write(trace.dump(Header(page_size=16, settings={"a.b": 1})) + "\n")
        file.writelines(trace.dump(line) + "\n" for line in LINES)
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_a_trace_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    header, lines = trace.read(written(tmp_path / name))
    assert header == Header(page_size=16, settings={"a.b": 1})
    assert list(lines) == LINES


def test_a_line_that_was_cut_off_ends_a_trace(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl")
    path.write_text(path.read_text()[:-10])
    assert list(trace.read(path)[1]) == LINES[:-1]


ARRIVAL = '{"kind":"arrival","prompt_tokens":8,"output_tokens":1,"max_tokens":1,%s}'


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 5: no JSON"),
        ("[]", "line 5: not an object"),
        ('{"kind":"nothing"}', "line 5: unknown kind 'nothing'"),
        ('{"kind":"step","at":1,"seconds":1}', "line 5: 'shape' is missing"),
        ('{"kind":"arrival","at":1,"sound":1}', "line 5: unknown key 'sound'"),
        (ARRIVAL % '"at":NaN', "line 5: at cannot be 'nan'"),
        (ARRIVAL % '"at":null', "line 5: at cannot be 'None'"),
        (ARRIVAL % '"at":1,"pages":[[0,1000000000]]', "line 5: more full pages than tokens"),
        (ARRIVAL % '"at":1,"pages":[[-1,1]]', "line 5: a page number below 0"),
        (ARRIVAL % '"at":1,"cached_tokens":-1', "line 5: cached_tokens cannot be -1"),
        (ARRIVAL % r'"at":1,"tenant":"\ud800"', "line 5: no JSON"),
        ("[" * 100_000, "line 5: too deep"),
    ],
)
def test_a_fault_names_its_line(tmp_path: Path, line: str, fault: str) -> None:
    path = written(tmp_path / "t.jsonl")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=fault):
        list(trace.read(path)[1])


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_what_is_no_text_is_no_trace(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\0 neither text nor gzip")
    with pytest.raises(ConfigError, match="after line 0: "):
        trace.read(path)


@pytest.mark.parametrize("module", [trace, record])
def test_another_file_or_version_is_refused(tmp_path: Path, module: object) -> None:
    path = tmp_path / "t.jsonl"
    for text, fault in [
        ('{"format":"other"}\n', "not a header"),
        (f'{{"format":"{module.FORMAT}","format_version":99}}\n', "version 99"),  # type: ignore[attr-defined]
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=fault):
            module.read(path)  # type: ignore[attr-defined]


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    records = [
        Record(0, 0.0, 0.1, first=0.3, end=1.0, gaps=(0.1, 0.2), targets={"ttft": 1.0}),
        Record(1, 0.5, 0.5, outcome="refused", status=503, retry_after=2.0),
    ]
    run = Run({"command": "x"}, 10.0, records, [Sample(1.0, {"dserve_x": 3.0})])
    record.write(run, tmp_path / "r.jsonl")
    assert record.read(tmp_path / "r.jsonl") == run
