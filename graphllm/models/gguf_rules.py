"""Rules for tensors that many of GGUF's architectures have, with Hugging Face's usual names.

What a single architecture adds is in `gguf_dense.py` and `gguf_moe.py`.
"""

from __future__ import annotations

from graphllm.models.gguf_architectures import RotaryStyle, TensorRule, rules
from graphllm.models.gguf_arrangements import key_halves, query_halves

LAYER = "model.layers.{}"
ATTENTION_STEMS = ("attn_q", "attn_k", "attn_v", "attn_output")
ENDS = rules({"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"})
INPUT_NORMS = rules(
    {
        "blk.{}.attn_norm": f"{LAYER}.input_layernorm",
        "blk.{}.ffn_norm": f"{LAYER}.post_attention_layernorm",
    }
)
HEAD_NORMS = {
    "blk.{}.attn_q_norm": f"{LAYER}.self_attn.q_norm",
    "blk.{}.attn_k_norm": f"{LAYER}.self_attn.k_norm",
}
VALUE_AND_OUTPUT = rules(
    {
        "blk.{}.attn_v": f"{LAYER}.self_attn.v_proj",
        "blk.{}.attn_output": f"{LAYER}.self_attn.o_proj",
    }
)
ATTENTION = (
    *rules({"blk.{}.attn_q": f"{LAYER}.self_attn.q_proj", "blk.{}.attn_k": f"{LAYER}.self_attn.k_proj"}),
    *VALUE_AND_OUTPUT,
)
PERMUTED_ATTENTION = (
    TensorRule(("blk.{}.attn_q",), f"{LAYER}.self_attn.q_proj", query_halves),
    TensorRule(("blk.{}.attn_k",), f"{LAYER}.self_attn.k_proj", key_halves),
    *VALUE_AND_OUTPUT,
)
MLP = rules(
    {
        "blk.{}.ffn_gate": f"{LAYER}.mlp.gate_proj",
        "blk.{}.ffn_up": f"{LAYER}.mlp.up_proj",
        "blk.{}.ffn_down": f"{LAYER}.mlp.down_proj",
    }
)
PLAIN_TENSORS = (*ENDS, *INPUT_NORMS, *ATTENTION, *MLP)
PARTIAL = RotaryStyle(is_partial=True)
