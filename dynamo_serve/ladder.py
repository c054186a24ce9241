"""The healing ladder as the API process knows it: how it stood last, and which engine it wants."""

from __future__ import annotations

import logging
from dataclasses import replace

from dynamo_serve.config import Config
from dynamo_serve.core.journal import Reason
from dynamo_serve.core.ladder import Mode, modes_of
from dynamo_serve.core.stats import Standing
from dynamo_serve.errors import InvalidRequest

log = logging.getLogger(__name__)

LIGHTER, RESTART = Reason.LIGHTER_WEIGHTS.value, Reason.RESTART_ENGINE.value
SPILL = Reason.SPILL.value


class Ladder:
    """`modes` are those that operators have set; `is_lighter` tells of the engine started last."""

    def __init__(self, config: Config) -> None:
        self.modes: dict[str, str] = {}
        self.is_lighter = False
        self._config = config
        self._standing = Standing()
        self._is_told = False  # by the engine started last

    def steer(self, rung: str, mode: str) -> None:
        """Raises `InvalidRequest` for what makes no sense."""
        if mode == "pin" and rung == RESTART:
            raise InvalidRequest(
                f"'{RESTART}' has no undo, so it cannot be pinned; allowed: 'auto', 'forbid'.",
                param="mode",
            )
        if mode == "pin" and rung == LIGHTER and not self._config.model.lighter:
            raise InvalidRequest(
                f"'{LIGHTER}' has no weights to switch to; set model.lighter and start again.",
                param="rung",
            )
        cache = self._config.cache
        if mode == "pin" and rung == SPILL and not (cache.host_gib or cache.disk_gib):
            raise InvalidRequest(
                f"'{SPILL}' has no tier to go to; set cache.host_gib or cache.disk_gib and start "
                "again.",
                param="rung",
            )
        self.modes = {**self.modes, rung: mode}

    def take(self, standing: Standing) -> None:
        """What an engine tells."""
        self._standing, self._is_told = standing, True

    def next_engine(self) -> tuple[Config, Standing]:
        """What to start an engine with."""
        config, self.is_lighter = self._config, self._wants_lighter
        self._is_told = False
        if self.is_lighter:
            assert config.model.lighter, "a rung without weights to switch to"
            model = replace(config.model, quantization=config.model.lighter)
            config = replace(config, model=model)
        return config, self._standing._replace(modes=self.modes)

    @property
    def wish(self) -> str | None:
        """Why there should be another engine than this one; None if there need not be."""
        if self._is_told and RESTART in self._standing.taken:
            return f"it has become slow (rung {RESTART})"
        if self._wants_lighter == self.is_lighter:
            return None
        what = "lighter weights are" if self._wants_lighter else "the usual weights are"
        return f"{what} wanted (rung {LIGHTER})"

    def doubt(self, reason: str) -> None:
        """An engine was of no use: if it had the lighter weights, that is the end of them."""
        if self.is_lighter:
            self.modes = {**self.modes, LIGHTER: "forbid"}
            what = "rung %s is forbidden until an operator releases it: with model.lighter %s: %s"
            log.error(what, LIGHTER, self._config.model.lighter, reason)

    @property
    def _wants_lighter(self) -> bool:
        settings = self._config.scheduler
        modes = modes_of(settings.ladder_pin, settings.ladder_forbid)
        mode = Mode(self.modes.get(LIGHTER, modes.get(LIGHTER, Mode.AUTO).value))
        return mode is Mode.PIN or (mode is Mode.AUTO and LIGHTER in self._standing.taken)
