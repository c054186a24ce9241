"""The network: a small Qwen3, trained in bf16 with master weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from scripts.bundled_model.packing import IGNORE, Rows
from scripts.bundled_model.tokenizer import CONTEXT

VOCAB = 2048
EMBED = "model.embed_tokens.weight"


def config(pad: int, end: int) -> Qwen3Config:
    """Six layers of width 256 with four query heads and two key heads of 64."""
    return Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        bos_token_id=None,
        pad_token_id=pad,
        eos_token_id=end,
        dtype=torch.bfloat16,
    )


class Network:
    """A bf16 model for the forward pass, float32 weights for the optimiser."""

    def __init__(self, settings: Qwen3Config, lr: float, compiled: bool = True) -> None:
        self.model = Qwen3ForCausalLM(settings).float()
        self.weights = list(self.model.parameters())
        self.master = [weight.detach().clone().requires_grad_() for weight in self.weights]
        self.model = cast(Qwen3ForCausalLM, self.model.bfloat16())
        self.weights = list(self.model.parameters())
        body: Any = self.model.model
        self.body = torch.compile(body, dynamic=False) if compiled else body
        names = [name for name, _ in self.model.named_parameters()]
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, weight in zip(names, self.master, strict=True):
            (matrices if weight.ndim == 2 and name != EMBED else others).append(weight)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]

    def loss(self, rows: Rows) -> Tensor:
        """Mean cross-entropy of the learned tokens; each is predicted from the place before it."""
        hidden = self.body(
            rows.ids, attention_mask=rows.mask, position_ids=rows.positions, use_cache=False
        ).last_hidden_state
        labels = rows.labels[:, 1:].reshape(-1)
        learned = labels != IGNORE
        states = hidden[:, :-1].reshape(-1, hidden.shape[-1])[learned]
        logits = functional.linear(states, self.model.lm_head.weight)
        return functional.cross_entropy(logits.float(), labels[learned])

    def step(self, rows: Rows, lr: float) -> float:
        """One update; returns the loss before it."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        loss = self.loss(rows)
        loss.backward()
        with torch.no_grad():
            for master, weight in zip(self.master, self.weights, strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float()
                weight.grad = None
            torch.nn.utils.clip_grad_norm_(self.master, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            for master, weight in zip(self.master, self.weights, strict=True):
                weight.copy_(master)
        return float(loss.detach())

    def load(self, folder: Path) -> None:
        """Takes over the weights of a saved model; the optimisers begin anew."""
        saved = load_file(folder / "model.safetensors")
        named = list(self.model.named_parameters())
        with torch.no_grad():
            for (name, weight), master in zip(named, self.master, strict=True):
                weight.copy_(saved[name])
                master.copy_(saved[name])

    def save(self, out: Path) -> None:
        """Writes the configs and model.safetensors; the head is tied to the embedding."""
        settings = self.model.config
        settings.architectures = ["Qwen3ForCausalLM"]
        settings.save_pretrained(out)
        defaults = GenerationConfig(
            eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id
        )
        defaults.save_pretrained(out)
        state = self.model.state_dict()
        del state["lm_head.weight"]
        tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        assert EMBED in tensors
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
