"""How GGUF architectures say what Hugging Face says: tensor names and metadata keys, as tables.

A new architecture is one more `GGUFArchitecture`. Owns the naming only: reading values and checking
them is in `gguf_config.py`, bytes are in `gguf_file.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFArchitecture:
    """One value of general.architecture and its Hugging Face equivalent."""

    hf_architecture: str
    model_type: str
    model_tensors: Mapping[str, str]
    """Tensors outside the layers: GGUF name to Hugging Face name, both without .weight or .bias."""
    layer_tensors: Mapping[str, str]
    """Tensors of a layer: GGUF name after "blk.N." to Hugging Face name after "model.layers.N."."""
    permuted_tensors: Mapping[str, str]
    """Layer tensors whose rows are permuted for interleaved rotary, and the key of their head count."""
    metadata_keys: frozenset[str]
    """Metadata keys understood, after "<architecture>."; any other would be ignored mathematics."""
    consumed_tensors: frozenset[str]
    """Tensors that say something of the configuration, and are no parameters."""
    hidden_act: str = "silu"

    def translate(self, name: str) -> str | None:
        """The Hugging Face name of a GGUF tensor, or None when this architecture has no such tensor."""
        stem, dot, kind = name.rpartition(".")
        if not dot or kind not in ("weight", "bias"):
            return None
        layer = _LAYER_TENSOR.fullmatch(stem)
        if layer is None:
            translated = self.model_tensors.get(stem)
        else:
            translated = self.layer_tensors.get(layer["tensor"])
            if translated is not None:
                translated = f"model.layers.{layer['index']}.{translated}"
        return None if translated is None else f"{translated}.{kind}"

    def num_layers(self, names: Iterable[str]) -> int:
        """How many different layers the GGUF names speak of."""
        layers = (_LAYER_TENSOR.fullmatch(name.rpartition(".")[0]) for name in names)
        return len({layer["index"] for layer in layers if layer is not None})

    def head_count_key(self, name: str) -> str | None:
        """For a tensor with permuted rows the metadata key that counts its heads, otherwise None."""
        layer = _LAYER_TENSOR.fullmatch(name.rpartition(".")[0])
        return None if layer is None else self.permuted_tensors.get(layer["tensor"])


_LAYER_TENSOR = re.compile(r"blk\.(?P<index>0|[1-9][0-9]{0,5})\.(?P<tensor>\w+)")

_DECODER_METADATA_KEYS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",  # refused unless 0
        "expert_used_count",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",  # the older name of rope.scaling.factor
        "rope.scaling.factor",
        "rope.scaling.finetuned",  # a note, no mathematics
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "tensor_data_layout",  # a note on who converted the file
        "vocab_size",
    }
)

ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(
        hf_architecture="LlamaForCausalLM",
        model_type="llama",
        model_tensors={
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "output": "lm_head",
        },
        layer_tensors={
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        permuted_tensors={"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"},
        metadata_keys=_DECODER_METADATA_KEYS,
        consumed_tensors=frozenset({"rope_freqs.weight"}),
    ),
}
"""By the value of general.architecture."""
