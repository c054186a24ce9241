"""Small random models of many architectures, written to disk as checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCAB_SIZE = 128

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

# name -> (config class, what differs from COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "head_dim": 8, **MOE}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "attn_logit_softcapping": 2.0, **SLIDING}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, **SLIDING}),
    "phi3": ("Phi3Config", {}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3, "logits_scaling": 4.0}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 6}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            "head_dim": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 1,
            "intermediate_size": [48] * 4,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "llama4": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "no_rope_layers": [1, 0],
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 64,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    "olmo3": ("Olmo3Config", SLIDING),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


def config_of(kind: str, changes: dict[str, Any]) -> Any:
    """A small configuration of the transformers class named `kind`."""
    return getattr(transformers, kind)(**{**COMMON, **changes})


@cache
def checkpoint(name: str, dtype: str = "float32") -> str:
    """A folder with random weights of `MODELS[name]`; the same ones every time."""
    kind, changes = MODELS[name]
    return save_random(config_of(kind, changes), name, dtype)


def save_random(config: Any, name: str, dtype: str = "float32") -> str:
    """A folder with random weights for `config`, large enough for its answers to differ."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
            elif parameter.abs().sum() == 0:
                parameter.normal_(0.0, 0.1)  # biases and sinks must matter
    folder = Path(mkdtemp(prefix=f"{name}-"))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return str(folder)


@cache
def plain_model(name: str) -> Any:
    """The same checkpoint as transformers runs it, with its own eager attention."""
    return AutoModelForCausalLM.from_pretrained(checkpoint(name), attn_implementation="eager")


@cache
def expected_tokens(name: str, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What `generate` answers greedily, `count` tokens whatever they are."""
    model = plain_model(name)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt) :].tolist())
