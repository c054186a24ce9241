"""Tensors as they travel: little-endian values, texts with their length before them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tritonclient.grpc import service_pb2

LENGTH = struct.Struct("<I")
FORMATS = {
    **{"BOOL": "?", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q"},
    **{"UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "FP32": "f", "FP64": "d"},
}
YES = ("true", "yes", "1", "t")
Value = str | int | float | bool | tuple[int, ...]


class Declared(NamedTuple):
    """What a model's config says of its inputs and outputs: their types by name. `repeats`: every
    response has all that was said before it."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    is_batched: bool
    is_decoupled: bool
    priority_levels: int
    repeats: bool = False

    @classmethod
    def of(cls, config: Any) -> Declared:
        """From the protobuf `ModelConfig`, whose types are called TYPE_STRING and the like."""
        batching = config.dynamic_batching if config.HasField("dynamic_batching") else None
        return cls(
            {entry.name: _datatype(entry) for entry in config.input},
            {entry.name: _datatype(entry) for entry in config.output},
            config.max_batch_size > 0,
            config.model_transaction_policy.decoupled,
            batching.priority_levels if batching else 0,
            config.parameters["accumulate_tokens"].string_value.lower() in YES,
        )


def _datatype(entry: Any) -> str:
    name: str = (
        entry.DESCRIPTOR.fields_by_name["data_type"]
        .enum_type.values_by_number[entry.data_type]
        .name
    )
    name = name.removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def request_of(
    model: str,
    id: str,
    values: Mapping[str, Value],
    declared: Declared,
    parameters: Mapping[str, int | bool],
) -> Any:
    """A `ModelInferRequest` with one value in each tensor, or a row of them."""
    request = service_pb2.ModelInferRequest(model_name=model, id=id)
    for name, value in values.items():
        datatype = declared.inputs[name]
        if datatype != "BYTES" and datatype not in FORMATS:
            raise ValueError(f"its input {name} has the type {datatype}")
        row = [len(value) if isinstance(value, tuple) else 1]
        shape = [1, *row] if declared.is_batched else row
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(encode(datatype, value))
    for name, value in parameters.items():
        kind = "bool_param" if isinstance(value, bool) else "int64_param"
        setattr(request.parameters[name], kind, value)
    return request


def encode(datatype: str, value: Value) -> bytes:
    if datatype == "BYTES":
        data = str(value).encode()
        return LENGTH.pack(len(data)) + data
    row = value if isinstance(value, tuple) else (value,)
    return struct.pack(f"<{len(row)}{FORMATS[datatype]}", *row)


def outputs_of(response: Any) -> dict[str, Sequence[Any]]:
    """The values of each output of a `ModelInferResponse`; texts are bytes."""
    return {
        output.name: decode(output.datatype, raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def decode(datatype: str, raw: bytes) -> Sequence[Any]:
    if datatype == "BYTES":
        return list(_texts(raw))
    if datatype not in FORMATS:  # half-precision numbers: of no output that is read
        return ()
    form = FORMATS[datatype]
    return struct.unpack(f"<{len(raw) // struct.calcsize(form)}{form}", raw)


def _texts(raw: bytes) -> list[bytes]:
    texts, start = [], 0
    while start < len(raw):
        (length,) = LENGTH.unpack_from(raw, start)
        start += LENGTH.size
        if start + length > len(raw):
            raise ValueError("a text that ends before its end")
        texts.append(raw[start : start + length])
        start += length
    return texts
