"""A checkpoint held in memory, and tiny random models that transformers computes the truth for."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from graphllm.errors import CheckpointError

STANDARD_DEVIATION = 0.15  # wide enough that attention is far from uniform: mistakes show


class MemoryCheckpoint:
    """The Checkpoint protocol over a dict. Counts how many of the tensors it handed out still live."""

    def __init__(self, hf_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.path = Path("memory.safetensors")
        self.hf_config = hf_config
        self.generation_config: dict[str, Any] = {}
        self.tensors = tensors
        self.most_alive = 0
        self._handed_out: list[weakref.ref[torch.Tensor]] = []

    def tensor_names(self) -> Collection[str]:
        return self.tensors.keys()

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name].clone()
        self._handed_out.append(weakref.ref(tensor))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self._handed_out))
        return tensor

    def load_tokenizer(self) -> Any:
        raise CheckpointError(f"{self.path}: these tests work on token ids.")


TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-2,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


def tiny_llama(*, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A random Llama of odd shape in float32; every parameter is redrawn, norms around 1."""
    model = LlamaForCausalLM(LlamaConfig(**(TINY_SHAPE | config))).eval()
    redraw(model, seed=seed)
    return model


def tiny_qwen3(*, seed: int = 0, **config: Any) -> Qwen3ForCausalLM:
    """The same of Qwen3; its heads do not fill the hidden size."""
    model = Qwen3ForCausalLM(Qwen3Config(**(TINY_SHAPE | {"head_dim": 16} | config))).eval()
    redraw(model, seed=seed)
    return model


def redraw(model: PreTrainedModel, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # a weight, but that no gradient reaches it
                buffer.normal_(0.0, STANDARD_DEVIATION, generator=generator)


def head_name(model: PreTrainedModel) -> str:
    """Where the model keeps the matrix behind its logits."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def as_checkpoint(model: PreTrainedModel) -> MemoryCheckpoint:
    """What `save_pretrained` would write: a tied head is not stored."""
    stored = revert_weight_conversion(model, dict(model.state_dict()))
    tensors = {name: tensor.detach().clone() for name, tensor in stored.items()}
    if model.config.tie_word_embeddings and model.get_output_embeddings() is not None:
        head = f"{head_name(model)}.weight"  # behind "language_model." in files of some models
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(head)}
    hf_config = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
    return MemoryCheckpoint(hf_config, tensors)
