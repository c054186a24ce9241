"""What an engine says about itself, and what tells its pages from those of another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from dynamo_serve.config import ModelSection
from dynamo_serve.engines.local.discovery import architecture
from dynamo_serve.engines.local.kv_cache import PoolSize
from dynamo_serve.grammars import LIBRARY

SAMPLE_BYTES = 1 << 16  # from both ends of a file of weights, to tell it from others
TELLING = ("architecture", "dtype", "page_size")

Facts = dict[str, str | int | float | bool]


def model_facts(model: PreTrainedModel, size: PoolSize, page_dtype: torch.dtype) -> Facts:
    device = model.device
    parameters = list(model.parameters())
    weights = sum(map(num_bytes, parameters))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_shared = head is not None and head.weight is embedding.weight
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "architecture": architecture(model.config),
        "model_type": str(model.config.model_type),
        "device": name if device.type == "cpu" else f"{device} ({name})",
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_dtype": str(page_dtype).removeprefix("torch."),
        "num_parameters": sum(p.numel() for p in parameters),
        "weights_bytes": weights,
        # In a step: all of them, but of the embedding a row a token, unless it is the head, too.
        "weights_read_bytes": weights - (0 if is_shared else num_bytes(embedding.weight)),
        "page_size": size.page_size,
        "kv_bytes_per_token": size.bytes_per_token,
        "kv_pool_bytes": size.num_bytes,
        "torch_version": str(torch.__version__),
        "transformers_version": str(transformers.__version__),
        "threads": torch.get_num_threads(),
        "grammars": LIBRARY,
    }


def num_bytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def page_facts(facts: Facts, model: ModelSection, path: str) -> dict[str, str]:
    """What has to be the same for a page to mean the same."""
    same = {name: str(facts[name]) for name in TELLING}
    if facts["kv_dtype"] != facts["dtype"]:  # folders from before it could differ stay good
        same["kv_dtype"] = str(facts["kv_dtype"])
    return {**same, "quantization": model.quantization, "model": fingerprint(path)}


def fingerprint(path: str) -> str:
    """Tells a model from others by its settings and by both ends of each file of weights."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(path).iterdir()):
        if file.name == "config.json":
            digest.update(file.read_bytes())
        elif file.suffix in (".safetensors", ".bin"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as weights:
                digest.update(weights.read(SAMPLE_BYTES))
                weights.seek(-min(SAMPLE_BYTES, size), os.SEEK_END)
                digest.update(weights.read())
    return digest.hexdigest()
