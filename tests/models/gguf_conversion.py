"""Tiny models of transformers as GGUF files, as the published converter writes them.

Names come from the `gguf` package's own map and metadata from its writer, so neither is ours; what the
converter does to numbers is written out here from its documentation and its files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models.memory_checkpoint import as_checkpoint

Array = npt.NDArray[np.float32]
Tensors = dict[str, torch.Tensor]
Change = Callable[[str, torch.Tensor, Mapping[str, Any]], Iterator[tuple[str, torch.Tensor]]]


def interleave_halves(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Row j of half h of a head becomes row 2j + h."""
    size = values.shape[0] // num_heads
    order = [
        head * size + half * (size // 2) + row
        for head in range(num_heads)
        for row in range(size // 2)
        for half in range(2)
    ]
    return values[order]


def permuted(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    if ".q_proj." in name:
        tensor = interleave_halves(tensor, config["num_attention_heads"])
    elif ".k_proj." in name:
        tensor = interleave_halves(tensor, config["num_key_value_heads"])
    yield name, tensor


def norms_plus_one(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield name, tensor + 1 if name.endswith("norm.weight") else tensor


def outputs_first(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield name, tensor.T if ".c_" in name and tensor.ndim == 2 else tensor


def ungrouped(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """All queries, all keys, all values, out of groups of a key head each."""
    if "query_key_value" in name:
        num_heads = config["num_attention_heads"]
        num_groups = config.get("num_kv_heads") or num_heads
        if config.get("multi_query") and not config["new_decoder_architecture"]:
            num_groups = 1
        head_dim = config["hidden_size"] // num_heads
        heads = tensor.reshape(num_groups, -1, head_dim, *tensor.shape[1:])
        parts = (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])
        tensor = torch.cat([part.flatten(0, 2) for part in parts])
    yield name, tensor


def single_vector_gate(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield name, tensor[0] if "shared_expert_gate" in name else tensor


def split_experts(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Granite's merged experts, beside Llama's permutation."""
    if "input_linear" in name:
        layer = name.split(".")[2]
        gate, up = tensor.chunk(2, dim=1)
        yield f"blk.{layer}.ffn_gate_exps.weight", gate
        yield f"blk.{layer}.ffn_up_exps.weight", up
    else:
        yield from permuted(name, tensor, config)


def unpaired_experts(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """gpt-oss: gates and factors by turns, inputs first, and sinks without a kind."""
    base = name.rpartition(".")[0]
    if name.endswith("sinks"):
        yield f"{name}.weight", tensor
    elif name.endswith("gate_up_proj"):
        yield f"{base}.gate_proj.weight", tensor[:, :, 0::2].mT
        yield f"{base}.up_proj.weight", tensor[:, :, 1::2].mT
    elif name.endswith("gate_up_proj_bias"):
        yield f"{base}.gate_proj.bias", tensor[:, 0::2]
        yield f"{base}.up_proj.bias", tensor[:, 1::2]
    elif name.endswith("down_proj"):
        yield f"{name}.weight", tensor.mT
    elif name.endswith("down_proj_bias"):
        yield name.replace("_bias", ".bias"), tensor
    else:
        yield name, tensor


def absorbed(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """DeepSeek's projection out of the latent in two, keys transposed; a selection bias as a bias."""
    if name.endswith("kv_b_proj.weight"):
        nope = config["qk_nope_head_dim"]
        sizes = config["num_attention_heads"], nope + config["v_head_dim"]
        heads = tensor.reshape(*sizes, *tensor.shape[1:])
        yield name.replace("kv_b", "k_b"), heads[:, :nope].mT
        yield name.replace("kv_b", "v_b"), heads[:, nope:]
    elif name.endswith("e_score_correction_bias"):
        yield name.replace("_correction_bias", "_correction.bias"), tensor
    else:
        yield name, tensor


def selection_bias(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor


def stacked(tensors: Tensors) -> Tensors:
    """Experts, and StableLM's norms of heads, in one tensor each."""
    together: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        start, numbered, rest = name, "", ""
        for word in (".experts.", "layernorm.norms."):
            if word in name:
                start, _, rest = name.partition(word)
                numbered = word
        if not numbered or not rest.partition(".")[0].isdigit():
            together[name] = [tensor]
            continue
        kind = rest.partition(".")[2]
        if numbered == ".experts.":
            mixtral = "block_sparse_moe" in start
            prefix = start.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
            whole = f"{prefix if mixtral else start}.experts.{kind}"
        else:
            whole = f"{start}layernorm.{kind}"
        together.setdefault(whole, []).append(tensor)  # in order of their numbers
    return {name: parts[0] if len(parts) == 1 else torch.stack(parts) for name, parts in together.items()}


def gguf_tensors(model: PreTrainedModel, architecture: str, changes: tuple[Change, ...]) -> dict[str, Array]:
    """GGUF name to values, as a converter makes them of the model's weights."""
    config = model.config.to_dict()
    tensors = as_checkpoint(model).tensors
    for change in changes:
        tensors = dict(pair for name, tensor in tensors.items() for pair in change(name, tensor, config))
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    name_map = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    translated = {}
    for name, tensor in stacked(tensors).items():
        gguf_name = name if name.startswith("blk.") else name_map.get_name(name, (".weight", ".bias"))
        assert gguf_name is not None, f"the gguf package has no name for {name}"
        translated[gguf_name] = tensor.contiguous().numpy()
    return translated | rotary_tensors(model)


def rotary_tensors(model: PreTrainedModel) -> dict[str, Array]:
    """What the file says of stretched frequencies in tensors."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    match rope.get("rope_type"):
        case "llama3":
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
            exponents = torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled))
            return {"rope_freqs.weight": (rope["rope_theta"] ** -exponents / scaled).numpy()}
        case "longrope":
            return {
                f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], dtype=np.float32)
                for length in ("long", "short")
            }
    return {}


def write_parameters(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """The metadata that the converter writes for every architecture."""
    for add, names in (
        (writer.add_block_count, ("num_hidden_layers", "n_layer")),
        (writer.add_context_length, ("max_position_embeddings", "n_positions")),
        (writer.add_embedding_length, ("hidden_size", "n_embd")),
        (writer.add_feed_forward_length, ("intermediate_size", "ffn_hidden_size", "n_inner")),
        (writer.add_head_count, ("num_attention_heads", "n_head")),
        (writer.add_head_count_kv, ("num_key_value_heads", "num_kv_heads")),
        (writer.add_layer_norm_rms_eps, ("rms_norm_eps",)),
        (writer.add_layer_norm_eps, ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
        (writer.add_expert_count, ("num_local_experts", "num_experts", "n_routed_experts")),
        (writer.add_expert_used_count, ("num_experts_per_tok",)),
        (writer.add_expert_group_count, ("n_group",)),
        (writer.add_expert_group_used_count, ("topk_group",)),
        (writer.add_expert_feed_forward_length, ("moe_intermediate_size",)),
        (writer.add_expert_shared_feed_forward_length, ("shared_expert_intermediate_size",)),
        (writer.add_key_length, ("head_dim",)),
        (writer.add_value_length, ("head_dim",)),
    ):
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is None and "n_inner" in names:
            value = 4 * config["n_embd"]
        if value is not None:
            add(value)
    write_rotary(writer, config)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def write_rotary(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    parameters = config.get("rope_parameters") or {}
    rope = parameters.get("full_attention", parameters)
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in parameters:
        writer.add_rope_freq_base_swa(parameters["sliding_attention"]["rope_theta"])
    match rope.get("rope_type"):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            if rope.get("attention_factor") is not None:
                writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
            if rope.get("beta_fast") is not None:
                writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            if rope.get("beta_slow") is not None:
                writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        case "longrope":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
            writer.add_rope_scaling_attn_factors(rope["attention_factor"])
            writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, Array],
    *,
    parameters: Callable[[gguf.GGUFWriter], None],
    tensor_type: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """tensor_type: of all matrices whose rows are whole blocks of it; the rest stays float32."""
    writer = gguf.GGUFWriter(path, architecture)
    parameters(writer)
    block = gguf.GGML_QUANT_SIZES[tensor_type][0]
    for name, values in tensors.items():
        if tensor_type is GGMLQuantizationType.F32 or values.ndim < 2 or values.shape[-1] % block:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, tensor_type), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
