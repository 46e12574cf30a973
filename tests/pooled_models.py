"""Tiny random checkpoints for vectors and scores, as they are published: transformers' files and sbert's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel

from tests.models.memory_checkpoint import redraw

HIDDEN = 32
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<sep>")
VOCAB_SIZE = 260
PAD, START, END, SEPARATOR = 256, 257, 258, 259
DECODER_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
ENCODER_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 300,
    "pad_token_id": 1,
}


def write_model(folder: Path, architecture: str, *, seed: int = 0, **keys: Any) -> PreTrainedModel:
    """A random model of transformers' class in `folder`, with its tokenizer; returns the model."""
    model_class = getattr(transformers, architecture)
    is_encoder = "Bert" in architecture or "Roberta" in architecture
    shape = ENCODER_SHAPE if is_encoder else DECODER_SHAPE
    model = model_class(model_class.config_class(**(shape | keys))).eval()
    assert isinstance(model, PreTrainedModel)
    redraw(model, seed=seed)
    model.save_pretrained(folder)
    if "Roberta" in architecture:
        template = processors.RobertaProcessing(("</s>", END), ("<s>", START))
    elif is_encoder:
        template = processors.TemplateProcessing(
            single="<s> $A <sep>",
            pair="<s> $A <sep> $B:1 <sep>:1",
            special_tokens=[("<s>", START), ("<sep>", SEPARATOR)],
        )
    else:
        template = processors.TemplateProcessing(
            single="$A </s>", pair="$A $B", special_tokens=[("</s>", END)]
        )
    tokenizer(template).save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json", {"eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
    )
    return model


def tokenizer(template: Any) -> Tokenizer:
    """One token a byte, the special tokens, and what the template puts around texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    backend.post_processor = template
    return backend


def write_sentence_transformer(
    folder: Path,
    *,
    pooling: Mapping[str, Any],
    dense: Sequence[tuple[int, int, str]] = (),
    normalizes: bool = True,
    max_seq_length: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """sentence-transformers' files beside a model. dense: (in, out, activation) of each layer."""
    kinds = ["Transformer", "Pooling", *("Dense" for _ in dense), *(["Normalize"] if normalizes else [])]
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds[1:], 1))]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    for path in paths[1:]:
        (folder / path).mkdir()
    write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": HIDDEN, **pooling})
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False}
    )
    if settings is not None:
        write_json(folder / "config_sentence_transformers.json", settings)
    generator = torch.Generator().manual_seed(1)
    for index, (num_in, num_out, activation) in enumerate(dense, 2):
        layer = folder / f"{index}_Dense"
        write_json(
            layer / "config.json",
            {
                "in_features": num_in,
                "out_features": num_out,
                "bias": True,
                "activation_function": f"torch.nn.modules.{activation}",
            },
        )
        tensors = {
            "linear.weight": torch.randn(num_out, num_in, generator=generator) / num_in**0.5,
            "linear.bias": torch.randn(num_out, generator=generator),
        }
        save_file(tensors, layer / "model.safetensors")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def hidden_states(model: PreTrainedModel, token_ids: Sequence[int], **arguments: Any) -> torch.Tensor:
    """[num_tokens, hidden_size], behind the final norm."""
    with torch.inference_mode():
        hidden: torch.Tensor = model(torch.tensor([token_ids]), **arguments).last_hidden_state[0]
    return hidden


def byte_ids(text: str) -> list[int]:
    """By the byte-level alphabet in the order of its characters."""
    order = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [order[char] for piece, _ in spelt for char in piece]
