"""peft as the oracle: it makes and merges adapters, and transformers continues prompts with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

LEAST_MARGIN = 1e-3
# peft asks transformers by a name that has become another.
PEFT_WARNINGS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def write_adapter(model: Path, folder: Path, *, seed: int, deviation: float = 0.3, **config: Any) -> Path:
    """Let peft write a random adapter for the model into `folder`; returns that."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=deviation)
    adapted.save_pretrained(folder)
    return folder


def merged_model(model: Path, adapter: Path | None = None) -> torch.nn.Module:
    """The model, merged with the adapter if there is one."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return base if adapter is None else PeftModel.from_pretrained(base, adapter).merge_and_unload()


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """The likeliest continuation, on which two computations must agree: every choice is a clear one."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > LEAST_MARGIN, "a poor prompt: choose another"
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :]
