"""A tiny random Llama checkpoint in Hugging Face layout, with a byte-level tokenizer made in code.

For tests of everything above the model: real loading, real weights, milliseconds a step.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 48, 2, 4, 2, 16, 96
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(folder: Path, *, seed: int = 0, context: int = 256) -> Path:
    """Write the checkpoint into `folder` (created) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def weight(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.15

    tensors = {
        "model.embed_tokens.weight": weight(VOCAB_SIZE, HIDDEN),
        "lm_head.weight": weight(VOCAB_SIZE, HIDDEN),
    }
    tensors["model.norm.weight"] = 1 + weight(HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": 1 + weight(HIDDEN),
            f"{name}.post_attention_layernorm.weight": 1 + weight(HIDDEN),
            f"{name}.self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.o_proj.weight": weight(HIDDEN, HEADS * HEAD_DIM),
            f"{name}.mlp.gate_proj.weight": weight(INTERMEDIATE, HIDDEN),
            f"{name}.mlp.up_proj.weight": weight(INTERMEDIATE, HIDDEN),
            f"{name}.mlp.down_proj.weight": weight(HIDDEN, INTERMEDIATE),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(context)))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """The tokenizer's files alone, for a checkpoint of `VOCAB_SIZE` that comes from elsewhere."""
    _tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {"eos_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def _config(context: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 256,
        "torch_dtype": "float32",
    }


def _tokenizer() -> Tokenizer:
    """One token a byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    return tokenizer
