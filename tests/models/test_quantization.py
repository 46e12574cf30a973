"""Which way a model's weights are stored: the checkpoint's word, the flag's, and what devices can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphllm.attention.paged import PagedAttention
from graphllm.config import QUANTIZATIONS as FLAG_VALUES
from graphllm.config import EngineConfig, PlanConfig
from graphllm.engine.planning import as_json, as_text, plan_capacity
from graphllm.errors import CheckpointError, ConfigError
from graphllm.kernels.linear import linear_ref
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.quantization import QUANTIZATIONS, read_quantization, refuse_quantization
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import load_model
from graphllm.quant.online import ONLINE_FORMS
from graphllm.quant.packed import PackedScheme
from graphllm.quant.scaled_form import ScaledForm
from graphllm.quant.scheme import LEAST_CAPABILITY, DeviceNeeds
from graphllm.runner.memory_estimate import weight_bytes
from tests.models.equality import prompt
from tests.models.memory_checkpoint import MemoryCheckpoint
from tests.models.paged_model import BLOCK_SIZE, PagedModel
from tests.models.test_packed_checkpoints import CASES, GPTQ
from tests.models.test_packed_checkpoints import configured_llama as configured
from tests.tiny_model import write_tiny_model

CPU = torch.device("cpu")


def test_the_flag_takes_what_the_table_has() -> None:
    assert FLAG_VALUES == QUANTIZATIONS


def test_plain_weights_stay_plain_unless_asked() -> None:
    quantization = read_quantization(configured(), asked=None)
    assert quantization.method is None and quantization.description == ""
    assert read_quantization(configured(), asked="int4").description == "int4"


def test_the_checkpoints_own_method_may_be_named_and_no_other() -> None:
    packed = configured(quantization_config=GPTQ)
    for asked in (None, "gptq"):
        assert read_quantization(packed, asked=asked).method == "gptq"
    for asked in ("awq", "int8"):
        with pytest.raises(ConfigError, match=f"--quantization {asked} contradicts .* stored as gptq"):
            read_quantization(packed, asked=asked)
    with pytest.raises(ConfigError, match=r"--quantization gptq: .* is not stored so; .* int4"):
        read_quantization(configured(), asked="gptq")


def test_older_files_have_another_key() -> None:
    compressed = CASES["compressed-tensors"].config
    assert read_quantization(configured(compression_config=compressed), asked=None).rules is not None


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_modules_of_transformers_refuse_packed_weights(key: str) -> None:
    refuse_quantization(configured(), asked=None)
    with pytest.raises(CheckpointError, match=f"'{key}' is there, but .* transformers' own module"):
        refuse_quantization(configured(**{key: GPTQ}), asked=None)
    with pytest.raises(ConfigError, match=r"--quantization int8: .* transformers' own module"):
        refuse_quantization(configured(), asked="int8")


def forms() -> dict[str, Any]:
    """Every form that can be asked for, by name."""
    found = {form.name: form for form in ONLINE_FORMS.values()}
    for case in CASES.values():
        rules = read_quantization(configured(quantization_config=case.config), asked=None)
        found |= {form.name: form for form in rules.forms}
    return found


@pytest.mark.parametrize("name", forms())
def test_what_a_card_cannot_run_is_refused_with_the_nearest_that_it_can(name: str) -> None:
    form = forms()[name]
    needs: DeviceNeeds = form.devices
    major, minor = needs.capability
    needs.check(name, device_type="cuda", capability=needs.capability)
    older = (major, minor - 1) if minor else (major - 1, 9)
    with pytest.raises(ConfigError) as caught:
        needs.check(name, device_type="cuda", capability=older)
    message = caught.value.message
    assert name in message and f"from compute capability {major}.{minor}" in message
    assert f"this one's is {older[0]}.{older[1]}" in message and needs.why in message
    if needs.capability == LEAST_CAPABILITY:
        assert message.endswith("The nearest that runs here is an unquantized version, as it is.")
        return
    assert f"--quantization {needs.instead}" in message
    # The nearest runs wherever anything does.
    nearest = ONLINE_FORMS[needs.instead].devices
    assert nearest.on_cpu and nearest.capability == LEAST_CAPABILITY


def test_what_a_processor_cannot_run_is_refused() -> None:
    needs = DeviceNeeds(on_cpu=False)
    with pytest.raises(ConfigError, match=r"Weights in X do not run on a CPU.*--quantization int8"):
        needs.check("X", device_type="cpu", capability=None)
    DeviceNeeds().check("X", device_type="cpu", capability=None)


@pytest.mark.parametrize("name", ["GPTQ, act-order", "AWQ", "compressed-tensors", "int8", "int4"])
def test_random_weights_have_the_form_that_is_asked_for(name: str, tmp_path: Path) -> None:
    """And take the memory that is foreseen for them."""
    is_online = name in ONLINE_FORMS
    config = configured().hf_config
    if not is_online:
        config = config | {"quantization_config": CASES[name].config}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    checkpoint, asked = DummyCheckpoint(path), name if is_online else None
    backend = PagedAttention(block_size=BLOCK_SIZE)
    model = load_model(
        checkpoint,
        backend=backend,
        device=CPU,
        dtype=torch.float32,
        product=linear_ref,
        quantization=asked,
    )
    layers = [
        module for module in model.modules() if isinstance(getattr(module, "scheme", None), PackedScheme)
    ]
    assert len(layers) == 8
    for layer in layers:
        rows = layer.scheme.dequantized_rows(layer, 0, 32, dtype=torch.float32)
        assert 0.01 < float(rows.std()) < 0.04 and abs(float(rows.mean())) < 0.005
    logits = PagedModel(model, backend).step([(0, prompt(8))])
    assert logits.isfinite().all() and logits.std() > 0
    stored = read_quantization(checkpoint, asked=asked)
    model_config = read_model_config(checkpoint, find_family(checkpoint))
    foreseen = weight_bytes(model_config, torch.float32, quantization=stored)
    assert foreseen.total == sum(parameter.nbytes for parameter in model.parameters())
    assert foreseen.total < weight_bytes(model_config, torch.float32).total


def test_a_plan_knows_how_weights_are_stored(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "model"))
    plans = {
        asked: plan_capacity(EngineConfig(model=model, quantization=asked), PlanConfig(gpu="a100-40"))
        for asked in (None, "int4")
    }
    assert plans["int4"].weights.attention < 0.5 * plans[None].weights.attention
    assert plans["int4"].weights.head == plans[None].weights.head
    assert as_json(plans["int4"])["quantization"] == "int4" and as_json(plans[None])["quantization"] is None
    assert "int4" in as_text(plans["int4"])


ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CHANNELS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
FLOATS = {"type": "float"}


def eight_bits(weights: dict[str, Any], activations: dict[str, Any], layout: str) -> MemoryCheckpoint:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    section = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
    return configured(quantization_config=section | {"ignore": ["lm_head"]})


@pytest.mark.parametrize(
    ("weights", "activations", "layout", "form"),
    [
        ({}, {}, "int-quantized", ScaledForm(stored="int8", scales_of="channel")),
        (
            {"strategy": "tensor"},
            {"strategy": "tensor", "dynamic": False},
            "int-quantized",
            ScaledForm(stored="int8", scales_of="tensor", given_name="input_scale"),
        ),
        (FLOATS, FLOATS, "float-quantized", ScaledForm(stored="e4m3", scales_of="channel")),
        (
            FLOATS | {"strategy": "tensor"},
            FLOATS | {"strategy": "tensor", "dynamic": False},
            "naive-quantized",
            ScaledForm(stored="e4m3", scales_of="tensor", given_name="input_scale"),
        ),
        (
            FLOATS | {"strategy": "block", "block_structure": [128, 64]},
            FLOATS | {"strategy": "group", "group_size": 64},
            "float-quantized",
            ScaledForm(stored="e4m3", scales_of="block", block=(128, 64)),
        ),
    ],
)
def test_weights_and_activations_of_8_bits_are_read(
    weights: dict[str, Any], activations: dict[str, Any], layout: str, form: ScaledForm
) -> None:
    checkpoint = eight_bits(CHANNELS | weights, ACTIVATIONS | activations, layout)
    rules = read_quantization(checkpoint, asked=None).rules
    assert rules is not None
    assert rules.form_of("model.layers.0.mlp.up_proj", None) == form
    assert rules.form_of("lm_head", None) is None


@pytest.mark.parametrize(
    ("weights", "activations", "complaint"),
    [
        ({"num_bits": 4}, {}, "weights.num_bits' is 4; where activations are rounded, 8"),
        ({}, {"num_bits": 4}, "input_activations.num_bits' is 4"),
        ({}, {"symmetric": False}, "input_activations.symmetric' is false"),
        ({"symmetric": False}, {}, "weights.symmetric' is false"),
        ({}, FLOATS, "input_activations.type' is not 'int'"),
        ({"strategy": "group", "group_size": 32}, {}, "weights.strategy' is 'group'; here tensor and"),
        ({"strategy": "block", "block_structure": [128, 128]}, {}, "weights.strategy' is 'block'"),
        ({}, {"dynamic": False}, "input_activations.strategy' is 'token'; here tensor"),
        ({"actorder": "group"}, {}, "'actorder' is there"),
        (FLOATS | {"strategy": "block", "block_structure": "all"}, FLOATS, "block_structure' is 'all'"),
        (
            FLOATS | {"strategy": "block", "block_structure": [128, 128]},
            FLOATS | {"strategy": "group", "group_size": 64},
            "input_activations.group_size' is not that of the weights' blocks, 128",
        ),
    ],
)
def test_other_arithmetic_of_8_bits_is_refused_by_name(
    weights: dict[str, Any], activations: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read_quantization(
            eight_bits(CHANNELS | weights, ACTIVATIONS | activations, "int-quantized"), asked=None
        )


def test_a_name_counts_more_than_a_class_and_what_is_ignored_more_than_both() -> None:
    four, eight = (
        {"targets": targets, "weights": dict(CHANNELS, num_bits=bits), "input_activations": None}
        for targets, bits in ((["Linear"], 4), (["re:.*down_proj", "model.layers.1.mlp.up_proj"], 8))
    )
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": four, "group_1": eight},
        "ignore": ["re:.*layers\\.0\\.mlp\\.down.*", "lm_head"],
    }
    rules = read_quantization(configured(quantization_config=section), asked=None).rules
    assert rules is not None

    def bits(module: str) -> int | None:
        form = rules.form_of(module, None)
        return None if form is None else getattr(form, "bits", 0)

    assert bits("model.layers.0.mlp.up_proj") == 4
    assert bits("model.layers.1.mlp.up_proj") == bits("model.layers.1.mlp.down_proj") == 8
    assert bits("model.layers.0.mlp.down_proj") is None and bits("lm_head") is None


def test_without_tensors_a_configuration_packs_what_such_checkpoints_do() -> None:
    """All of the layers, the head only where it says so, and not what it names."""
    rules = read_quantization(configured(quantization_config=GPTQ), asked=None).rules
    with_head = read_quantization(configured(quantization_config=GPTQ | {"lm_head": True}), asked=None).rules
    awq = CASES["AWQ"].config | {"modules_to_not_convert": ["mlp.gate"]}
    without_gate = read_quantization(configured(quantization_config=awq), asked=None).rules
    assert rules is not None and with_head is not None and without_gate is not None
    assert rules.form_of("model.layers.0.mlp.up_proj", None) is not None
    assert rules.form_of("lm_head", None) is None and with_head.form_of("lm_head", None) is not None
    assert without_gate.form_of("model.layers.0.mlp.gate", None) is None
    assert without_gate.form_of("model.layers.0.mlp.gate_proj", None) is not None


PUBLISHED = {
    "Qwen2.5-7B-Instruct-GPTQ-Int4": (
        {
            "bits": 4,
            "checkpoint_format": "gptq",
            "damp_percent": 0.01,
            "desc_act": False,
            "group_size": 128,
            "model_file_base_name": None,
            "model_name_or_path": None,
            "quant_method": "gptq",
            "static_groups": False,
            "sym": True,
            "true_sequential": True,
        },
        "GPTQ, 4 bits in groups of 128",
    ),
    "as GPTQModel writes it": (
        {
            "bits": 4,
            "checkpoint_format": "gptq",
            "desc_act": True,
            "dynamic": None,
            "group_size": 128,
            "lm_head": False,
            "meta": {"damp_percent": 0.01, "quantizer": ["gptqmodel:1.4.0"], "uri": "https://example.org"},
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": True,
        },
        "GPTQ, 4 bits in groups of 128, act-order",
    ),
    "as transformers saves GPTQ": (
        {
            "backend": "auto_trainable",
            "batch_size": 1,
            "bits": 8,
            "block_name_to_quantize": None,
            "cache_block_outputs": True,
            "damp_percent": 0.1,
            "dataset": ["a text"],
            "desc_act": False,
            "exllama_config": {"version": 1},
            "group_size": -1,
            "max_input_length": None,
            "meta": None,
            "model_seqlen": None,
            "module_name_preceding_first_block": None,
            "modules_in_block_to_quantize": None,
            "pad_token_id": None,
            "quant_method": "gptq",
            "sym": False,
            "tokenizer": None,
            "true_sequential": True,
            "use_cuda_fp16": False,
            "use_exllama": True,
        },
        "GPTQ, 8 bits in whole rows, asymmetric",
    ),
    "Qwen2.5-7B-Instruct-AWQ": (
        {
            "bits": 4,
            "group_size": 128,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
        "AWQ, 4 bits in groups of 128, asymmetric",
    ),
    "Meta-Llama-3.1-8B-Instruct-quantized.w4a16": (
        {
            "config_groups": {
                "group_0": {
                    "input_activations": None,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "actorder": "weight",
                        "block_structure": None,
                        "dynamic": False,
                        "group_size": 128,
                        "num_bits": 4,
                        "observer": "minmax",
                        "observer_kwargs": {},
                        "strategy": "group",
                        "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "format": "pack-quantized",
            "global_compression_ratio": 1.89,
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": "0.10.3",
        },
        "compressed-tensors, 4 bits in groups of 128",
    ),
    "Meta-Llama-3.1-8B-Instruct-quantized.w8a8": (
        {
            "config_groups": {
                "group_0": {
                    "input_activations": {
                        "actorder": None,
                        "block_structure": None,
                        "dynamic": True,
                        "group_size": None,
                        "num_bits": 8,
                        "observer": None,
                        "observer_kwargs": {},
                        "strategy": "token",
                        "symmetric": True,
                        "type": "int",
                    },
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "dynamic": False,
                        "group_size": None,
                        "num_bits": 8,
                        "observer": "mse",
                        "observer_kwargs": {},
                        "strategy": "channel",
                        "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "format": "int-quantized",
            "ignore": ["lm_head"],
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        },
        "int8, a scale a row, dynamic activations",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sections_that_are_published_are_understood(name: str) -> None:
    section, description = PUBLISHED[name]
    found = read_quantization(configured(quantization_config=section), asked=None)
    assert found.description == description
