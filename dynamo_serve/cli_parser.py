"""A parser that knows what somebody meant by a flag that there is not."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from dynamo_serve import settings

NEAR = 0.75  # of 1: so much alike are a word and a slip of it


class Parser(argparse.ArgumentParser):
    """Of a command, too: so what it does not know is refused with the command's own usage."""

    # Typed as loosely as where it comes from.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}{self._hint(unknown)}")
        return found, unknown

    def _hint(self, unknown: Sequence[str]) -> str:
        if not unknown[0].startswith("-"):
            return f"; did you mean --model {unknown[0]}?" if self._knows("--model") else ""
        flag = next((each for each in unknown if each.startswith("--")), "").partition("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=NEAR)
        key = setting_like(flag) if self._knows("--set") else None
        if key is not None and (not near or key.rpartition(".")[2] == flag[2:].replace("-", "_")):
            return f"; did you mean --set {key}=VALUE?"
        return f"; did you mean {near[0]}?" if near else ""

    def _knows(self, flag: str) -> bool:
        return flag in self._option_string_actions


def setting_like(flag: str) -> str | None:
    """The setting whose name a flag has, or nearly: --max-model-len is model.max_model_len."""
    keys = {key.rpartition(".")[2]: key for key in settings.all_keys()}
    near = difflib.get_close_matches(flag.strip("-").replace("-", "_"), keys, n=1, cutoff=NEAR)
    return keys[near[0]] if near else None
