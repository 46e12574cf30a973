"""LoRA adapters for the tiny model, written in the format of peft's folders, without peft.

Their numbers are large enough to change most tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_model import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS

SIZES = {  # a layer's in_features and out_features
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD_DIM),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.o_proj": (HEADS * HEAD_DIM, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
ALL_TARGETS = tuple(name.rpartition(".")[2] for name in SIZES)


def write_tiny_adapter(
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: Sequence[str] = ALL_TARGETS,
    deviation: float = 0.3,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter into `folder` (created) and return it.

    tensors: by name, instead of the ones that belong there, or None for none; config: keys of the
    configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for name, (in_features, out_features) in SIZES.items():
            if name.rpartition(".")[2] in targets:
                module = f"base_model.model.model.layers.{layer}.{name}"
                sizes = {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}
                for side, size in sizes.items():
                    values = torch.randn(size, generator=generator) * deviation
                    found[f"{module}.{side}.weight"] = values
    for name, tensor in (tensors or {}).items():
        found.pop(name, None)
        if tensor is not None:
            found[name] = tensor
    save_file(found, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(targets), **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder
