"""Who pays, and what was promised: plain data, handed to the core at start and on reload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

NOBODY = "unnamed"  # the class without a tenants file


@dataclass(frozen=True, slots=True)
class Class:
    """What was promised to a request. Times are in seconds; `inf` promises nothing.

    `rank` orders classes: 0 is preempted last. Targets steer who is next and how large chunks are.
    A `strict` class has more: what would get its first token too late is refused on arrival, and
    the batch grows only as far as the ITL target allows. `deadline` counts from the arrival and
    holds for requests that bring none of their own.
    """

    name: str
    rank: int = 1
    ttft: float = inf
    itl: float = inf
    max_queue_delay: float | None = None  # of the merge window; None: what the server's is
    deadline: float = inf
    strict: bool = False
    reader_patience: float | None = None  # for one that stands still; None: what the server's is

    @property
    def is_batch(self) -> bool:
        """Whether it has no target: such work gives way first."""
        return self.ttft == inf and self.itl == inf

    @property
    def is_promised(self) -> bool:
        """Whether it has a target that somebody set for it, not for everybody."""
        return not self.is_batch and self.name != NOBODY


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant may have at most; None is no limit.

    `live_sequences` and `pages_burst` make its requests wait, the others have them refused.
    `pages_guaranteed` are its own as soon as it needs them, whoever borrowed them meanwhile.
    """

    live_sequences: int | None = None
    pages_guaranteed: int = 0
    pages_burst: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    queue_length: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who pays. Between busy tenants the device is shared in proportion to `weight`."""

    name: str
    weight: float = 1.0
    class_name: str = "standard"
    quota: Quota = Quota()


CLASSES = {
    "interactive": Class("interactive", 0, ttft=1.0, itl=0.15, strict=True),
    "standard": Class("standard", 1, ttft=5.0, itl=0.3),
    "batch": Class("batch", 2, max_queue_delay=0.02),
}
# Without a tenants file nobody was promised anything; but no stream should stand still for long.
UNNAMED = Class(NOBODY, 1, itl=1.0)


@dataclass(frozen=True, slots=True)
class Tenancy:
    """Every tenant and every class by name."""

    tenants: Mapping[str, Tenant] = field(
        default_factory=lambda: {"default": Tenant("default", class_name=UNNAMED.name)}
    )
    classes: Mapping[str, Class] = field(default_factory=lambda: {**CLASSES, UNNAMED.name: UNNAMED})

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Tenancy:
        """From what `dataclasses.asdict` made of one."""
        return cls(
            {
                name: Tenant(**{**facts, "quota": Quota(**facts["quota"])})
                for name, facts in plain["tenants"].items()
            },
            {name: Class(**facts) for name, facts in plain["classes"].items()},
        )

    def tenant(self, name: str) -> Tenant:
        """The tenant, or, for one that a reload has removed meanwhile, one with no promises."""
        return self.tenants.get(name) or Tenant(name)

    def class_of(self, tenant: str, asked: str | None = None) -> Class:
        """The class of a request; `asked` is one its tenant may choose (the edge checked)."""
        name = asked or self.tenant(tenant).class_name
        return self.classes.get(name) or Class(name)
