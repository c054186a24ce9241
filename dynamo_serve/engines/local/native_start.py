"""Whether a model's layers run on the native kernels, and making it so."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from dynamo_serve.config import EngineSection, ModelSection
from dynamo_serve.engines.local.attention import BackendNeeds
from dynamo_serve.engines.local.discovery import UnsupportedModel
from dynamo_serve.engines.local.kv_cache import KVCache
from dynamo_serve.engines.local.native_model import (
    LayerPart,
    NotNative,
    build_native,
    check_native,
)
from dynamo_serve.engines.local.native_runner import NativeRunner
from dynamo_serve.engines.local.self_check import PageCheck
from dynamo_serve.errors import EngineStartError
from dynamo_serve.native.library import Kernels, NativeUnavailable, choose
from dynamo_serve.native.packing import TYPES
from dynamo_serve.native.structs import Type

logger = logging.getLogger(__name__)

INT8_TOLERANCE = 0.3  # of random logits; a layer left out or a wrong mask is off by about 1


class NativeWish:
    """What the settings ask for, and the kernels that can do it."""

    def __init__(
        self, model: ModelSection, engine: EngineSection, setting: str = "model.quantization"
    ) -> None:
        """`setting` is the one that says what the weights are."""
        self.quantization = model.quantization
        self.setting = setting
        self.lighter: NativeWish | None = None  # what a rung of the ladder may want
        if model.lighter:
            light = replace(model, quantization=model.lighter, lighter="")
            self.lighter = NativeWish(light, engine, "model.lighter")
        self.attention = engine.attention
        self.kernels = engine.kernels
        self._differs = ""  # what a packed model was found to do

    def _kind(self, model: PreTrainedModel) -> Type:
        """What the weights are packed as."""
        return Type.INT8 if self.quantization == "int8" else TYPES[model.dtype]

    def _kernels(self, model: PreTrainedModel, needs: BackendNeeds) -> Kernels | None:
        """The kernels that run `model` from end to end; None, with the reason in the log.

        Raises `EngineStartError` when a set is named that does not run here, or when the weights
        are to be quantized, which only the kernels can do.
        """
        try:
            if needs.device.type != "cpu":
                raise NotNative(f"they run on the CPU, this is {needs.device}")
            if self.attention not in ("auto", "native"):
                raise NotNative(f"engine.attention is {self.attention}")
            if self._differs:
                raise NotNative(self._differs)
            kernels = choose(self.kernels)
            if model.dtype not in TYPES:
                raise NotNative(f"they have no {str(model.dtype).removeprefix('torch.')}")
            check_native(model, needs.layers, self._kind(model))
        except NotNative as reason:
            self.do_without(str(reason))
            return None
        except NativeUnavailable as reason:
            if self.kernels not in ("auto", "torch"):
                raise EngineStartError(
                    f"engine.kernels: {self.kernels} cannot run: {reason}; 'auto' takes what can"
                ) from reason
            self.do_without(str(reason))
            return None
        return kernels

    def do_without(self, reason: str) -> None:
        """Say so in the log, or raise `EngineStartError`."""
        if self.quantization != "none":
            raise EngineStartError(
                f"{self.setting}: {self.quantization} needs the native kernels to run the whole "
                f"model, and they cannot: {reason}; change that, or leave {self.setting} out"
            )
        logger.info("transformers' own modules run this model: %s", reason)

    def gave_up(self, reason: str) -> None:
        """A packed model does not compute what it should: load it for transformers' modules.

        Raises `EngineStartError` where the kernels were asked for by name.
        """
        if self.quantization != "none" or self.kernels != "auto" or self.attention == "native":
            raise EngineStartError(
                f"the native kernels do not compute what this model's own modules do: {reason}; "
                "leave engine.kernels and engine.attention at auto and model.quantization at none"
            )
        logger.warning("the native kernels do not suit this model: %s", reason)
        self._differs = reason

    def run(
        self,
        model: PreTrainedModel,
        needs: BackendNeeds,
        cache: KVCache,
        num_positions: int,
        check: PageCheck,
    ) -> NativeRunner | None:
        """A runner whose logits were compared with `check`; `model` is left without weights.

        None, with the reason in the log, where transformers' own modules are to run. Raises
        `NotNative` when the comparison fails: `model` has to be loaded again then.
        """
        if self.lighter:  # now, not when the ladder wants it
            self.lighter._kernels(model, needs)
        kernels = self._kernels(model, needs)
        if kernels is None:
            return None
        kernels.set_threads(torch.get_num_threads())
        kind = self._kind(model)
        parts = [LayerPart(*pair) for pair in zip(needs.layers, cache.layers, strict=True)]
        positions = max(num_positions, check.num_tokens)
        native = build_native(model, parts, kernels, kind=kind, num_positions=positions)
        runner = NativeRunner(model, native, kernels, needs.page_size)
        try:
            tolerance = INT8_TOLERANCE if kind == Type.INT8 else None
            check.compare(runner, needs.page_dtype, tolerance)
        except UnsupportedModel as error:
            raise NotNative(str(error)) from error
        return runner
