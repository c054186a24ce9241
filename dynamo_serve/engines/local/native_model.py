"""Families of decoders whose layers the native kernels run from end to end."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from dynamo_serve.engines.local.attention import LayerPages, LayerSpec
from dynamo_serve.engines.local.native_attention import attention_struct
from dynamo_serve.native import structs
from dynamo_serve.native.library import Kernels
from dynamo_serve.native.packing import TYPES, PackedLinear, pack_linear
from dynamo_serve.native.structs import Activation, Type

# Families by config.model_type; True where a norm's weight is kept as its difference from one.
PLAIN, OFFSET = False, True
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), PLAIN),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), OFFSET),
}


TILE_DEPTH = {Type.FLOAT32: 1, Type.BFLOAT16: 32, Type.INT8: 64}


class NotNative(Exception):
    """The kernels cannot run this model; the message says why."""


class LayerPart(NamedTuple):
    """What one layer gets from outside its weights."""

    spec: LayerSpec
    pages: LayerPages


@dataclass(slots=True)
class NativeModel:
    """The structures of a model and everything that they point at."""

    struct: structs.Model
    keep: list[object] = field(default_factory=list)  # what the structures point at
    vocab_size: int = 0
    softcap: float | None = None  # of the logits
    embedding_bytes: int = 0  # of which a step reads only a row a token; the head is apart

    @property
    def weights_bytes(self) -> int:
        packed = sum(p.weights.num_bytes for p in self.keep if isinstance(p, PackedLinear))
        tensors = [t for t in self.keep if isinstance(t, torch.Tensor)]
        return packed + sum(int(t.numel() * t.itemsize) for t in tensors)


def check_native(model: PreTrainedModel, specs: Sequence[LayerSpec], kind: Type) -> None:
    """Raises `NotNative` with the first reason why the kernels cannot run `model`."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise NotNative(f"they do not know the family {config.model_type}")
    if model.dtype not in TYPES:
        raise NotNative(f"they have no {str(model.dtype).removeprefix('torch.')}")
    for module in model.model.layers:
        _check_products(module)
    if type(model.lm_head) is not torch.nn.Linear:
        raise NotNative(f"its head is a {type(model.lm_head).__name__}")
    _activation(model)
    first, depth = specs[0], TILE_DEPTH[kind]
    sizes = (config.hidden_size, config.intermediate_size, first.num_heads * first.key_dim)
    if any(size % depth for size in sizes):
        raise NotNative(f"their tiles need widths that are multiples of {depth}, not {sizes}")
    if any(s.key_dim != s.value_dim or s.sinks is not None for s in specs):
        raise NotNative("its attention has sinks, or values of their own width")
    if len({(s.num_heads, s.num_kv_heads, s.key_dim) for s in specs}) > 1:
        raise NotNative("its layers differ in their heads")
    if len({s.window for s in specs if s.window}) > 1:
        raise NotNative("its layers differ in their sliding windows")


def build_native(
    model: PreTrainedModel,
    parts: Sequence[LayerPart],
    kernels: Kernels,
    *,
    kind: Type,
    num_positions: int,
) -> NativeModel:
    """Pack `model`'s weights as `kind`, layer by layer, and take them away from it."""
    config, decoder = model.config, model.model
    packer = _Packer(model, kernels, kind, FAMILIES[config.model_type])
    tables = _rotary_tables(model, num_positions)
    layers = (structs.Layer * len(parts))()
    for i, (module, part) in enumerate(zip(decoder.layers, parts, strict=True)):
        cos, sin = tables[_layer_type(config, i) if len(tables) > 1 else next(iter(tables))]
        layers[i] = packer.layer(module, part, cos, sin)
        _take_away(module)
    # A copy: what the checkpoint was read from is one mapping, and lasts as long as any part of it.
    embedding = decoder.embed_tokens.weight.detach().clone()
    final_norm = packer.norm(decoder.norm)
    head = packer.linear([model.lm_head])
    _take_away(model)
    scale = getattr(decoder.embed_tokens, "embed_scale", None)
    struct = structs.Model(
        layers=ctypes.addressof(layers),
        embedding=embedding.data_ptr(),
        final_norm=final_norm,
        head=head,
        norm_eps=config.rms_norm_eps,
        embedding_scale=1.0 if scale is None else float(scale.to(embedding.dtype)),
        num_layers=len(parts),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        rotary_dim=2 * next(iter(tables.values()))[0].shape[1],
        activation=_activation(model),
        embedding_type=TYPES[embedding.dtype],
    )
    keep = [*packer.keep, layers, embedding, tables, parts]
    softcap = getattr(config, "final_logit_softcapping", None)
    num_bytes = embedding.numel() * embedding.itemsize
    return NativeModel(struct, keep, head.outputs, softcap, num_bytes)


def _products(module: Any) -> dict[str, list[Any]]:
    """The linear modules of one layer, merged as the kernels run them."""
    attention, mlp = module.self_attn, module.mlp
    qkv, gate_up = getattr(attention, "qkv_proj", None), getattr(mlp, "gate_up_proj", None)
    return {
        "qkv": [qkv] if qkv else [attention.q_proj, attention.k_proj, attention.v_proj],
        "out": [attention.o_proj],
        "gate_up": [gate_up] if gate_up else [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }


def _check_products(module: Any) -> None:
    """Raises `NotNative` for a product that is not a plain one: quantized, or with an adapter."""
    for parts in _products(module).values():
        for part in parts:
            if type(part) is not torch.nn.Linear or part.weight.dtype not in TYPES:
                raise NotNative(f"one of its products is a {type(part).__name__}")
        if len({part.bias is None for part in parts}) > 1:
            raise NotNative("some of its products have a bias where their neighbours have none")


def _activation(model: PreTrainedModel) -> Activation:
    """Found by trying: settings name it in several ways, and not all of them count."""
    mlp = model.model.layers[0].mlp
    function = getattr(mlp, "act_fn", None) or mlp.activation_fn
    x = torch.linspace(-6, 6, 49)
    for kind, expected in (
        (Activation.SILU, torch.nn.functional.silu(x)),
        (Activation.GELU_TANH, torch.nn.functional.gelu(x, approximate="tanh")),
    ):
        if torch.allclose(function(x), expected, atol=1e-6):
            return kind
    raise NotNative(f"they have no activation like {type(function).__name__}")


def _layer_type(config: Any, index: int) -> str:
    return str(config.layer_types[index])


def _rotary_tables(
    model: PreTrainedModel, num_positions: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin [positions, rotary_dim / 2] by layer type, from the model's own module."""
    rotary = model.model.rotary_emb
    like, positions = torch.empty(1, dtype=torch.float32), torch.arange(num_positions)[None]
    kinds: list[str] = [""]
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds = sorted(set(model.config.layer_types))
    tables = {}
    for kind in kinds:
        with torch.inference_mode():
            pair = rotary(like, positions, **({"layer_type": kind} if kind else {}))
        cos, sin = (table[0, :, : table.shape[2] // 2].float().contiguous() for table in pair)
        tables[kind] = (cos, sin)
    return tables


def _take_away(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)


class _Packer:
    """Packs modules; remembers what must stay alive."""

    def __init__(
        self, model: PreTrainedModel, kernels: Kernels, kind: Type, offset_norms: bool
    ) -> None:
        self.keep: list[object] = []
        self._kernels = kernels
        self._kind = kind
        self._offset = 1.0 if offset_norms else 0.0

    def layer(
        self, module: Any, part: LayerPart, cos: torch.Tensor, sin: torch.Tensor
    ) -> structs.Layer:
        attention, products = module.self_attn, _products(module)
        # Two norms behind the sublayers, too, or only those before them.
        before_mlp = getattr(module, "pre_feedforward_layernorm", None)
        after_attention = module.post_attention_layernorm if before_mlp else None
        return structs.Layer(
            **{
                name: self.linear(parts, gated=name == "gate_up")
                for name, parts in products.items()
            },
            attention=attention_struct(part.spec, part.pages),
            input_norm=self.norm(module.input_layernorm),
            query_norm=self.norm(getattr(attention, "q_norm", None)),
            key_norm=self.norm(getattr(attention, "k_norm", None)),
            after_attention_norm=self.norm(after_attention),
            before_mlp_norm=self.norm(before_mlp or module.post_attention_layernorm),
            after_mlp_norm=self.norm(getattr(module, "post_feedforward_layernorm", None)),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
        )

    def linear(self, modules: Sequence[Any], gated: bool = False) -> structs.Linear:
        weights, biases = [m.weight for m in modules], [m.bias for m in modules]
        packed = pack_linear(self._kernels, weights, biases, kind=self._kind, gated=gated)
        self.keep.append(packed)
        return packed.struct

    def norm(self, module: Any) -> int | None:
        """The address of the norm's weights in float32."""
        if module is None:
            return None
        weight = module.weight.detach().float() + self._offset
        self.keep.append(weight)
        return int(weight.data_ptr())
