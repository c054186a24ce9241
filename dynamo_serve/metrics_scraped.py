"""Metrics of other servers, shown among our own: under their own names, with a label that says
whose they are.

Read strictly, line by line, and written anew: one line that is none would cost whoever scrapes us
the whole page. The text format is Prometheus' 0.0.4.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\n"])*)"')
SAMPLE = re.compile(
    rf"({NAME})(?:\{{((?:{LABEL.pattern}(?:,|(?=\}})))*)\}})?[ \t]+"
    r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|Inf|NaN|nan|inf))(?:[ \t]+-?\d+)?[ \t]*"
)
COMMENT = re.compile(rf"# (HELP|TYPE) ({NAME})(?: (.*))?")
KINDS = ("counter", "gauge", "histogram", "summary", "untyped")
SUFFIXES = ("_bucket", "_sum", "_count")
MINE, THEIRS = "endpoint", "exported_endpoint"  # the label that is added, and one of that name
COUNT, EXECUTIONS = "nv_inference_count", "nv_inference_exec_count"


class Sample(NamedTuple):
    name: str
    labels: tuple[tuple[str, str], ...]  # values as they are written, escapes included
    value: str


@dataclass(slots=True)
class Family:
    kind: str = "untyped"
    help: str = ""
    samples: list[Sample] = field(default_factory=list)


Page = Mapping[str, Family]


def read(text: str) -> Page:
    """The families in a page, by name. Raises `ValueError` for a line that is none."""
    families: dict[str, Family] = {}
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if found := SAMPLE.fullmatch(line):
            name, labels, value = found[1], sorted(LABEL.findall(found[2] or "")), found[5]
            if len(dict(labels)) < len(labels):
                raise ValueError(f"line {number} has a label twice: {line[:60]!r}")
            family = families.setdefault(_family_of(name, families), Family())
            family.samples.append(Sample(name, tuple(labels), value))
        elif found := COMMENT.fullmatch(line):
            _declare(families.setdefault(found[2], Family()), found[1], found[3] or "")
        elif line and not line.startswith("#"):
            raise ValueError(f"line {number} is no metric: {line[:60]!r}")
    return families


def _declare(family: Family, what: str, said: str) -> None:
    if what == "HELP":
        family.help = said
    elif said in KINDS:
        family.kind = said


def _family_of(name: str, families: Mapping[str, Family]) -> str:
    for suffix in SUFFIXES:
        stem = families.get(name.removesuffix(suffix))
        if stem and name not in families and stem.kind in ("histogram", "summary"):
            return name.removesuffix(suffix)
    return name


def written(pages: Mapping[str, Page], taken: Collection[str]) -> bytes:
    """All pages as one, each sample with its endpoint; without the families whose names are
    `taken`, and of a name with two meanings the first alone."""
    names = dict.fromkeys(name for page in pages.values() for name in page)
    lines: list[str] = []
    for name in [name for name in names if name not in taken]:
        own = [(endpoint, page[name]) for endpoint, page in pages.items() if name in page]
        kind = own[0][1].kind
        lines += [f"# HELP {name} {own[0][1].help}", f"# TYPE {name} {kind}"]
        for endpoint, family in own:
            if family.kind == kind:
                lines += _lines(endpoint, family)
    return "".join(f"{line}\n" for line in lines).encode()


def _lines(endpoint: str, family: Family) -> Iterator[str]:
    seen = set()
    for sample in family.samples:
        if (sample.name, sample.labels) in seen:  # told twice: the first counts
            continue
        seen.add((sample.name, sample.labels))
        own = dict(sample.labels)
        if MINE in own:
            own[THEIRS] = own.pop(MINE)
        labels = ",".join(f'{name}="{value}"' for name, value in {MINE: endpoint, **own}.items())
        yield f"{sample.name}{{{labels}}} {sample.value}"


def mean_batches(page: Page) -> dict[tuple[str, str], float]:
    """Requests in a batch, on average since it was loaded, by a model's name and version."""
    counts, executions = (_by_model(page.get(name)) for name in (COUNT, EXECUTIONS))
    return {
        model: counts[model] / number
        for model, number in executions.items()
        if number > 0 and model in counts
    }


def _by_model(family: Family | None) -> dict[tuple[str, str], float]:
    numbers: dict[tuple[str, str], float] = {}
    for sample in family.samples if family else ():
        labels = dict(sample.labels)
        key = labels.get("model", ""), labels.get("version", "")
        numbers[key] = numbers.get(key, 0.0) + float(sample.value)
    return numbers
