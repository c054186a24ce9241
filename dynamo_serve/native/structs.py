"""The structures of `src/kernels.h`, field by field; `library.py` compares their sizes at start."""

from __future__ import annotations

from ctypes import CFUNCTYPE, Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum

Between = CFUNCTYPE(None)
"""Called between two layers. What it raises goes nowhere: it must raise nothing."""


class Type(IntEnum):
    """What numbers are kept in."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2


class Activation(IntEnum):
    """What is done to the gate of a gated MLP."""

    SILU = 0
    GELU_TANH = 1


class Stage(IntEnum):
    """What a step's time goes to. A norm behind a layer's part counts as that part."""

    EMBED = 0
    NORMS = 1
    QKV = 2
    ROTATE = 3
    ATTEND = 4
    OUT = 5
    GATE_UP = 6
    DOWN = 7
    HEAD = 8


class Linear(Structure):
    """Packed weights of one product; `scales` and `bias` have a number per column of each panel."""

    _fields_ = (
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("type", c_int32),
        ("gated", c_int32),
    )


class Attention(Structure):
    """One layer's pages and shape; 0 stands for no soft cap and no window."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("sinks", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("page_size", c_int32),
        ("type", c_int32),
    )


class Layer(Structure):
    """One decoder layer; norms that a family lacks are null."""

    _fields_ = (
        ("qkv", Linear),
        ("out", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("attention", Attention),
        ("input_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("after_attention_norm", c_void_p),
        ("before_mlp_norm", c_void_p),
        ("after_mlp_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class Model(Structure):
    """A whole decoder; `layers` points to `num_layers` of `Layer`."""

    _fields_ = (
        ("layers", c_void_p),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("head", Linear),
        ("norm_eps", c_float),
        ("embedding_scale", c_float),
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("intermediate", c_int32),
        ("rotary_dim", c_int32),
        ("activation", c_int32),
        ("embedding_type", c_int32),
    )


class Step(Structure):
    """One step's tokens and rows; see `src/kernels.h` for the shapes."""

    _fields_ = (
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("samples", c_void_p),
        ("wanted", c_void_p),
        ("starts", c_void_p),
        ("page_starts", c_void_p),
        ("pages", c_void_p),
        ("logits", c_void_p),
        ("states", c_void_p),
        ("num_tokens", c_int32),
        ("num_rows", c_int32),
        ("num_samples", c_int32),
        ("num_wanted", c_int32),
        ("between", Between),
        ("every", c_int64),
        ("spent", c_void_p),
    )


class Queries(Structure):
    """Queries and where the result goes, [T, heads, head_dim], with strides in elements."""

    _fields_ = (
        ("queries", c_void_p),
        ("out", c_void_p),
        ("query_stride", c_int64),
        ("out_stride", c_int64),
        ("type", c_int32),
    )


class Spent(Structure):
    """Nanoseconds by `Stage`."""

    _fields_ = (("nanoseconds", c_int64 * len(Stage)),)


ALL: tuple[type[Structure], ...] = (Linear, Attention, Layer, Model, Step, Queries, Spent)
