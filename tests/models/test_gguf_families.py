"""A GGUF file of every architecture computes what the same weights in a Hugging Face folder do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import PreTrainedModel

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.models import gguf as gguf_module
from graphllm.models.checkpoint import Checkpoint
from graphllm.models.gguf import GGUFCheckpoint
from graphllm.models.gguf_architectures import GGUFArchitecture
from graphllm.models.gguf_arrangements import Arrangement, key_rows, query_rows, value_rows
from graphllm.models.gguf_families import ARCHITECTURES
from graphllm.models.weights import load_model
from tests.models.equality import CPU, error, prompt
from tests.models.gguf_conversion import Array, gguf_tensors, write_gguf, write_parameters
from tests.models.gguf_families import CASES, GGUFCase
from tests.models.memory_checkpoint import as_checkpoint
from tests.models.paged_model import BLOCK_SIZE, PagedModel

TOLERANCE = 1e-5  # of the largest logit


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    backend = PagedAttention(block_size=BLOCK_SIZE)
    model = load_model(checkpoint, backend=backend, device=CPU, dtype=torch.float32, product=linear_ref)
    return PagedModel(model, backend).step([(0, prompt(90))])


def written(
    path: Path,
    case: GGUFCase,
    model: PreTrainedModel,
    *,
    tensors: Mapping[str, Array] | None = None,
    **options: Any,
) -> GGUFCheckpoint:
    def parameters(writer: gguf.GGUFWriter) -> None:
        write_parameters(writer, model.config.to_dict())
        case.extra(writer, model.config.to_dict())

    if tensors is None:
        tensors = gguf_tensors(model, case.architecture, case.changes)
    return GGUFCheckpoint(
        write_gguf(path / "m.gguf", case.architecture, tensors, parameters=parameters, **options)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gguf_file_computes_what_the_folder_does(tmp_path: Path, case: GGUFCase) -> None:
    model = case.family.tiny(case.variant, **case.keys)
    assert error(logits(written(tmp_path, case, model)), logits(as_checkpoint(model))) < TOLERANCE


ARRANGED = {
    (name, rule.arrange): declaration
    for name, declarations in ARCHITECTURES.items()
    for declaration in declarations
    for rule in declaration.tensors
    if rule.arrange is not None
}
# Files of before the converter split the projection; no case has one, for the package has no such name.
MERGED_IN_OLD_FILES = (query_rows, key_rows, value_rows)


@pytest.mark.parametrize(
    ("architecture", "arrange"),
    [
        pytest.param(name, arrange, id=f"{name}: {arrange.__name__}")
        for name, arrange in ARRANGED
        if arrange not in MERGED_IN_OLD_FILES
    ],
)
def test_an_arrangement_that_is_forgotten_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, arrange: Arrangement
) -> None:
    def forget(declaration: GGUFArchitecture) -> GGUFArchitecture:
        tensors = (
            replace(rule, arrange=None) if rule.arrange is arrange else rule for rule in declaration.tensors
        )
        return replace(declaration, tensors=tuple(tensors))

    declared = tuple(map(forget, ARCHITECTURES[architecture]))
    monkeypatch.setattr(gguf_module, "ARCHITECTURES", {architecture: declared})
    changed = [case for case in CASES if case.architecture == architecture and case.changes]
    assert any(_shows(tmp_path, case) for case in changed)


def _shows(path: Path, case: GGUFCase) -> bool:
    model = case.family.tiny(case.variant, **case.keys)
    try:
        return error(logits(written(path, case, model)), logits(as_checkpoint(model))) > 100 * TOLERANCE
    except CheckpointError:
        return True


QUANTIZED = [
    ("qwen3moe", {"hidden_size": 64, "moe_intermediate_size": 32}, GGMLQuantizationType.Q8_0),
    ("gpt-oss", {"hidden_size": 64, "intermediate_size": 32}, GGMLQuantizationType.MXFP4),
    ("gemma3", {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}, GGMLQuantizationType.Q5_0),
    ("llama", {"hidden_size": 64, "intermediate_size": 96}, GGMLQuantizationType.BF16),
    ("deepseek2", {"hidden_size": 64, "kv_lora_rank": 32}, GGMLQuantizationType.Q4_1),
]


@pytest.mark.parametrize(
    ("architecture", "keys", "tensor_type"), QUANTIZED, ids=[f"{row[0]}-{row[2].name}" for row in QUANTIZED]
)
def test_quantized_file_computes_what_its_dequantized_weights_do(
    tmp_path: Path, architecture: str, keys: dict[str, Any], tensor_type: GGMLQuantizationType
) -> None:
    case = next(case for case in CASES if case.architecture == architecture)
    model = case.family.tiny(case.variant, **{**case.keys, **keys})
    tensors = gguf_tensors(model, architecture, case.changes)
    block = gguf.GGML_QUANT_SIZES[tensor_type][0]
    dequantized = {
        name: gguf.dequantize(gguf.quantize(values, tensor_type), tensor_type)
        if values.ndim > 1 and values.shape[-1] % block == 0
        else values
        for name, values in tensors.items()
    }
    plain = logits(written(tmp_path, case, model, tensors=dequantized))
    assert error(logits(written(tmp_path, case, model, tensor_type=tensor_type)), plain) < TOLERANCE
    assert error(logits(as_checkpoint(model)), plain) > TOLERANCE, "the quantization shows"


def old_merged_attention(tensors: dict[str, Array]) -> dict[str, Array]:
    merged = {}
    for name, values in tensors.items():
        if ".attn_q." in name:
            rest = [tensors[name.replace("attn_q", f"attn_{part}")] for part in "kv"]
            merged[name.replace("attn_q", "attn_qkv")] = np.concatenate([values, *rest])
        elif ".attn_k." not in name and ".attn_v." not in name:
            merged[name] = values
    return merged


@pytest.mark.parametrize("architecture", ["phi2", "chatglm", "glm4"])
def test_merged_projections_of_older_files_are_taken_apart(tmp_path: Path, architecture: str) -> None:
    case = next(case for case in CASES if case.architecture == architecture)
    model = case.family.tiny(case.variant, **case.keys)
    merged = old_merged_attention(gguf_tensors(model, architecture, case.changes))
    assert any("attn_qkv" in name for name in merged)
    checkpoint = written(tmp_path, case, model, tensors=merged)
    assert error(logits(checkpoint), logits(as_checkpoint(model))) < TOLERANCE


def test_mixtral_with_a_tensor_for_each_expert_is_read(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.family.name == "Mixtral")
    model = case.family.tiny(case.variant)
    tensors = {}
    for name, values in gguf_tensors(model, "llama", case.changes).items():
        if "_exps" in name:
            for index, expert in enumerate(values):
                tensors[name.replace("_exps", f".{index}")] = expert
        else:
            tensors[name] = values
    checkpoint = written(tmp_path, case, model, tensors=tensors)
    assert error(logits(checkpoint), logits(as_checkpoint(model))) < TOLERANCE


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.architecture == "glm4moe")
    model = case.family.tiny(case.variant, **case.keys)
    num_layers = model.config.num_hidden_layers
    tensors = gguf_tensors(model, "glm4moe", case.changes)
    tensors[f"blk.{num_layers}.nextn.eh_proj.weight"] = np.zeros((4, 4), dtype=np.float32)
    tensors[f"blk.{num_layers}.attn_norm.weight"] = np.zeros(4, dtype=np.float32)

    def further(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
        case.extra(writer, config)
        writer.kv_data[0].pop("glm4moe.block_count")
        writer.add_block_count(num_layers + 1)
        writer.add_nextn_predict_layers(1)

    checkpoint = written(tmp_path, replace(case, extra=further), model, tensors=tensors)
    assert error(logits(checkpoint), logits(as_checkpoint(model))) < TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "num_layers", "scalar"), [("gemma2", 46, 12), ("gemma2", 2, 16), ("gemma3", 62, 12)]
)
def test_the_largest_gemmas_scale_scores_by_their_width(
    tmp_path: Path, architecture: str, num_layers: int, scalar: int
) -> None:
    case = next(case for case in CASES if case.architecture == architecture)
    layer_types = ["sliding_attention", "full_attention"] * (num_layers // 2)
    model = case.family.tiny(
        case.variant, **{**case.keys, "num_hidden_layers": num_layers, "layer_types": layer_types}
    )
    assert written(tmp_path, case, model).hf_config["query_pre_attn_scalar"] == scalar


def test_starcoder2_has_the_window_of_all_published_models(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.architecture == "starcoder2")
    assert written(tmp_path, case, case.family.tiny(case.variant)).hf_config["sliding_window"] == 4096


def change(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write a metadata key in place of what is there; None removes it."""
    writer.kv_data[0].pop(key, None)
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case list():
            writer.add_array(key, value)


REFUSED = {
    "a window's layers miscounted": (
        "gemma3",
        {"gemma3.attention.sliding_window_pattern": [True]},
        "'gemma3.attention.sliding_window_pattern' has 1 entries for 2 layers",
    ),
    "a window's layers as numbers": (
        "gemma3",
        {"gemma3.attention.sliding_window_pattern": [1, 0]},
        "'gemma3.attention.sliding_window_pattern' should be a list of truth values",
    ),
    "a window where the architecture has none": (
        "qwen2",
        {"qwen2.attention.sliding_window": 512},
        "'qwen2.attention.sliding_window' is not understood",
    ),
    "a cap that is no number": (
        "gemma2",
        {"gemma2.final_logit_softcapping": float("nan")},
        "'gemma2.final_logit_softcapping' is nan; it should be a positive number",
    ),
    "sigmoids where softmax was trained": (
        "qwen3moe",
        {"qwen3moe.expert_gating_func": 2},
        "'qwen3moe.expert_gating_func' is 2, which is not supported",
    ),
    "softmax where sigmoids were trained": (
        "glm4moe",
        {"glm4moe.expert_gating_func": 1},
        "'glm4moe.expert_gating_func' is 1, which is not supported",
    ),
    "a scale of experts' weights": (
        "qwen2moe",
        {"qwen2moe.expert_weights_scale": 2.5},
        "'qwen2moe.expert_weights_scale' is 2.5, which is not supported",
    ),
    "clamped queries, keys and values": (
        "olmoe",
        {"olmoe.attention.clamp_kqv": 8.0},
        "'olmoe.attention.clamp_kqv' is not understood",
    ),
    "experts without their number": (
        "qwen3moe",
        {"qwen3moe.expert_count": None},
        "'qwen3moe.expert_count' is missing",
    ),
    "many experts and no word of groups": (
        "deepseek2",
        {"deepseek2.expert_count": 256, "deepseek2.expert_group_count": None},
        "'deepseek2.expert_group_count' is missing",
    ),
    "more that turns than a key has": (
        "deepseek2",
        {"deepseek2.attention.key_length_mla": 6},
        "'deepseek2.attention.key_length_mla' is 6, no more than the 6 dimensions that turn",
    ),
    "another latent than the keys'": (
        "deepseek2",
        {"deepseek2.attention.value_length": 7},
        "'deepseek2.attention.value_length' is 7, which is not supported",
    ),
    "a strength of YaRN without YaRN": (
        "deepseek2",
        {"deepseek2.rope.scaling.yarn_log_multiplier": 0.1},
        "'deepseek2.rope.scaling.yarn_log_multiplier' is there, but rotary is not YaRN's",
    ),
    "as many further layers as there are": (
        "glm4moe",
        {"glm4moe.nextn_predict_layers": 2},
        "'glm4moe.nextn_predict_layers' is 2, and leaves none of 2 layers",
    ),
    "more that turns than there is of a head": (
        "phi2",
        {"phi2.rope.dimension_count": 14},
        "'phi2.rope.dimension_count' differs from the head's 12 dimensions",
    ),
    "key heads that do not divide the others": (
        "qwen3",
        {"qwen3.attention.head_count_kv": 3},
        "'qwen3.attention.head_count_kv' is 3, which does not divide 4",
    ),
    "temperatures by length": (
        "llama",
        {"llama.attention.temperature_scale": 0.1},
        "'llama.attention.temperature_scale' is not understood",
    ),
}


@pytest.mark.parametrize(("architecture", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_metadata_that_would_change_the_mathematics_are_refused_by_name(
    tmp_path: Path, architecture: str, changes: Mapping[str, Any], reason: str
) -> None:
    case = next(case for case in CASES if case.architecture == architecture)
    model = case.family.tiny(case.variant, **case.keys)

    def changed(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
        case.extra(writer, config)
        for key, value in changes.items():
            change(writer, key, value)

    with pytest.raises(CheckpointError) as caught:
        written(tmp_path, replace(case, extra=changed), model)
    assert f"m.gguf: metadata key {reason}" in caught.value.message


def test_parts_that_are_missing_or_twofold_are_refused(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.architecture == "granitemoe")
    model = case.family.tiny(case.variant, **case.keys)
    tensors = gguf_tensors(model, "granitemoe", case.changes)
    alone = {name: values for name, values in tensors.items() if name != "blk.1.ffn_up_exps.weight"}
    message = "'blk.1.ffn_gate_exps.weight' has no 'blk.1.ffn_up_exps.weight' beside it"
    with pytest.raises(CheckpointError, match=message):
        written(tmp_path, case, model, tensors=alone)
    case = next(case for case in CASES if case.architecture == "deepseek2")
    model = case.family.tiny(case.variant, **case.keys)
    tensors = gguf_tensors(model, "deepseek2", case.changes) | gguf_tensors(model, "deepseek2", ())
    with pytest.raises(CheckpointError, match=r"are both the model's 'model\.layers\.0\..*kv_b_proj"):
        written(tmp_path, case, model, tensors=tensors)


def test_a_stack_of_absurd_height_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.architecture == "qwen3moe")
    model = case.family.tiny(case.variant)
    tensors = gguf_tensors(model, "qwen3moe", case.changes)
    tensors["blk.0.ffn_up_exps.weight"] = np.zeros((5000, 1, 1), dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up_exps\.weight' has 5000 entries"):
        written(tmp_path, case, model, tensors=tensors)


def test_every_architecture_is_among_the_cases() -> None:
    assert {case.architecture for case in CASES} == ARCHITECTURES.keys()
