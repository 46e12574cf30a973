"""Checkpoints of published integer formats: what they stand for is what is computed, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.models.decoder import Decoder
from graphllm.models.weights import load_model
from graphllm.quant.packed import PackedScheme
from graphllm.quant.unquantized import Unquantized
from tests.models import packers
from tests.models.equality import CPU, TOLERANCE, error, prompt, theirs
from tests.models.families import FAMILIES
from tests.models.memory_checkpoint import MemoryCheckpoint, as_checkpoint, tiny_llama
from tests.models.moe_families import MOE_FAMILIES
from tests.models.packers import Packer, packed
from tests.models.paged_model import BLOCK_SIZE, PagedModel

FAMILY_OF = {family.name: family for family in (*FAMILIES, *MOE_FAMILIES)}
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def compressed(weights: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        **keys,
    }


@dataclass(frozen=True, slots=True)
class Case:
    """A format: its quantization_config, and what packs a matrix so."""

    config: dict[str, Any]
    packer: Packer


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "dynamic": False,
    "observer": "minmax",
    "observer_kwargs": {},
}
CHANNEL = WEIGHTS | {"strategy": "channel", "group_size": None}
CASES = {
    "GPTQ": Case(GPTQ, packers.gptq(bits=4, group_size=32, symmetric=True)),
    "GPTQ, asymmetric rows": Case(
        GPTQ | {"group_size": -1, "sym": False}, packers.gptq(bits=4, group_size=None, symmetric=False)
    ),
    "GPTQ, act-order": Case(
        GPTQ | {"desc_act": True, "sym": False},
        packers.gptq(bits=4, group_size=32, symmetric=False, act_order=True),
    ),
    "GPTQ, 8 bits, second version": Case(
        GPTQ | {"bits": 8, "group_size": 16, "sym": False, "checkpoint_format": "gptq_v2"},
        packers.gptq(bits=8, group_size=16, symmetric=False, version=2),
    ),
    "AWQ": Case(AWQ, packers.awq(group_size=32)),
    "AWQ, older keys, whole rows": Case(
        {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "zero_point": True, "version": "GEMM"},
        packers.awq(group_size=None),
    ),
    "compressed-tensors": Case(
        compressed(WEIGHTS), packers.pack_quantized(bits=4, group_size=32, symmetric=True)
    ),
    "compressed-tensors, asymmetric, act-order": Case(
        compressed(WEIGHTS | {"symmetric": False, "actorder": "group"}),
        packers.pack_quantized(bits=4, group_size=32, symmetric=False, act_order=True),
    ),
    "compressed-tensors, 8 bits, asymmetric channels": Case(
        compressed(CHANNEL | {"num_bits": 8, "symmetric": False}),
        packers.pack_quantized(bits=8, group_size=None, symmetric=False),
    ),
    "compressed-tensors, codes as they are": Case(
        compressed(CHANNEL | {"num_bits": 8}, format="naive-quantized"), packers.unpacked_int8()
    ),
    "compressed-tensors, one scale": Case(
        compressed(CHANNEL | {"num_bits": 8, "strategy": "tensor"}, format="int-quantized"),
        packers.unpacked_int8(one_scale=True),
    ),
}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch's products of packed weights, which round activations to bfloat16: this is of weights."""
    monkeypatch.setattr("graphllm.kernels.packed_cpu.takes_library", lambda weight: False)


def load(checkpoint: MemoryCheckpoint, **options: Any) -> tuple[Decoder, PagedModel]:
    backend = PagedAttention(block_size=BLOCK_SIZE)
    settings = {"device": CPU, "dtype": torch.float32, "product": linear_ref} | options
    model = load_model(checkpoint, backend=backend, **settings)
    return model, PagedModel(model, backend)


def logits(checkpoint: MemoryCheckpoint, **options: Any) -> torch.Tensor:
    return load(checkpoint, **options)[1].step([(0, prompt(40))])


def configured_llama(**keys: Any) -> MemoryCheckpoint:
    """A configuration without tensors."""
    return MemoryCheckpoint(as_checkpoint(tiny_llama(**SIZES)).hf_config | keys, {})


def schemes(model: Decoder) -> dict[str, object]:
    """The linear layers' schemes, by path."""
    return {path: module.scheme for path, module in model.named_modules() if hasattr(module, "scheme")}


def transformers_logits(model: PreTrainedModel, plain: MemoryCheckpoint) -> torch.Tensor:
    """Of transformers' own model with the plain numbers that a packed checkpoint stands for."""
    missing, unexpected = model.load_state_dict(plain.tensors, strict=False)
    assert not missing and not unexpected
    return theirs(model, prompt(40))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_plain_numbers(name: str) -> None:
    case, model = CASES[name], tiny_llama(**SIZES, attention_bias=True)
    stored, plain = packed(as_checkpoint(model), case.packer, config=case.config)
    decoder, ours = load(stored)
    assert error(ours.step([(0, prompt(40))]), transformers_logits(model, plain)) < TOLERANCE
    packed_layers = [path for path, scheme in schemes(decoder).items() if isinstance(scheme, PackedScheme)]
    assert len(packed_layers) == 4 * 2, "no layer was made plain"
    assert isinstance(decoder.head.scheme, Unquantized)


@pytest.mark.parametrize("name", ["GPTQ, act-order", "AWQ", "compressed-tensors, asymmetric, act-order"])
def test_experts_stay_packed(name: str) -> None:
    case = CASES[name]
    model = FAMILY_OF["Qwen2-MoE"].tiny(
        next(iter(FAMILY_OF["Qwen2-MoE"].variants)),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=96,
        num_attention_heads=4,
    )
    config = case.config
    if "ignore" in config:
        config = config | {"ignore": ["lm_head", "re:.*mlp\\.gate$", "re:.*shared_expert_gate$"]}
    stored, plain = packed(as_checkpoint(model), case.packer, config=config)
    decoder, ours = load(stored)
    assert error(ours.step([(0, prompt(40))]), logits(plain)) < TOLERANCE
    of_layers = {path: scheme for path, scheme in schemes(decoder).items() if "router" not in path}
    assert {path for path, scheme in of_layers.items() if isinstance(scheme, Unquantized)} == {"head"}
    assert any(path.endswith("moe.down") for path in of_layers)


def test_layers_that_the_configuration_leaves_out_are_plain() -> None:
    """By a pattern; and by the tensors that are there, where the configuration does not list them."""
    model = tiny_llama(**SIZES)
    case = CASES["compressed-tensors"]
    config = case.config | {
        "ignore": ["lm_head", "re:.*layers\\.0\\.mlp.*", "model.layers.1.self_attn.o_proj"]
    }

    def is_packed(module: str) -> bool:
        return "layers.0.mlp" not in module and module != "model.layers.1.self_attn.o_proj"

    for packing, packer in ((config, case.packer), (GPTQ, CASES["GPTQ"].packer), (AWQ, CASES["AWQ"].packer)):
        stored, plain = packed(as_checkpoint(model), packer, config=packing, is_packed=is_packed)
        decoder, ours = load(stored)
        assert error(ours.step([(0, prompt(40))]), logits(plain)) < TOLERANCE
        left_out = {path for path, scheme in schemes(decoder).items() if isinstance(scheme, Unquantized)}
        assert left_out == {"layers.0.mlp.gate_up", "layers.0.mlp.down", "layers.1.attention.output", "head"}


def test_modules_may_have_forms_of_their_own() -> None:
    """As GPTQModel's `dynamic` and compressed-tensors' groups say, down to the head."""
    model = tiny_llama(**SIZES)
    eight = packers.gptq(bits=8, group_size=64, symmetric=True)
    four = CASES["GPTQ"].packer

    def mixed(module: str, weight: torch.Tensor) -> Any:
        return (eight if "down_proj" in module else four)(module, weight)

    dynamic = {"+:.*down_proj": {"bits": 8, "group_size": 64}, "-:.*layers\\.1\\.self_attn": {}}
    stored, plain = packed(
        as_checkpoint(model),
        mixed,
        config=GPTQ | {"dynamic": dynamic},
        is_packed=lambda module: "layers.1.self_attn" not in module,
    )
    assert error(logits(stored), logits(plain)) < TOLERANCE


def test_a_packed_head_stays_packed() -> None:
    model = tiny_llama(**SIZES, vocab_size=96)
    plain = as_checkpoint(model)
    tensors, head = CASES["GPTQ"].packer("lm_head", plain.tensors["lm_head.weight"])
    stored, plain = packed(plain, CASES["GPTQ"].packer, config=GPTQ | {"lm_head": True})
    del stored.tensors["lm_head.weight"]
    stored.tensors |= {f"lm_head.{name}": tensor for name, tensor in tensors.items()}
    plain.tensors["lm_head.weight"] = head
    token_ids = [token % 96 for token in prompt(40)]
    found, expected = (load(checkpoint)[1].step([(0, token_ids)]) for checkpoint in (stored, plain))
    assert error(found, expected) < TOLERANCE


def test_plain_layers_take_packed_tensors_as_numbers() -> None:
    """A router is never rounded any further, but some checkpoints round it themselves."""
    variant = next(iter(FAMILY_OF["Mixtral"].variants))
    model = FAMILY_OF["Mixtral"].tiny(variant, **SIZES, num_local_experts=8)
    stored, plain = packed(as_checkpoint(model), CASES["GPTQ"].packer, config=GPTQ)
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe.gate"
        weight = stored.tensors.pop(f"{name}.weight")
        tensors, plain.tensors[f"{name}.weight"] = CASES["GPTQ"].packer(name, weight)
        stored.tensors |= {f"{name}.{tensor}": value for tensor, value in tensors.items()}
    assert error(logits(stored), logits(plain)) < TOLERANCE


@pytest.mark.parametrize("name", ["GPTQ, act-order", "AWQ", "compressed-tensors"])
def test_latents_are_spelled_out_of_packed_numbers(name: str) -> None:
    """The projection that attention absorbs is multiplied head by head, in plain numbers."""
    case, family = CASES[name], FAMILY_OF["DeepSeek-V3"]
    model = family.tiny(
        next(iter(family.variants)),
        **SIZES,
        moe_intermediate_size=64,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config = case.config | ({"ignore": ["lm_head", "re:.*mlp\\.gate$"]} if "ignore" in case.config else {})
    stored, plain = packed(as_checkpoint(model), case.packer, config=config)
    decoder, ours = load(stored)
    assert error(ours.step([(0, prompt(40))]), logits(plain)) < TOLERANCE
    assert isinstance(schemes(decoder)["layers.1.attention.output"], PackedScheme)


@pytest.mark.parametrize("family", ["Phi-3", "Qwen2-MoE", "DeepSeek-V2", "GPT-2", "GPT-NeoX", "gpt-oss"])
def test_plain_checkpoints_of_any_layout_are_rounded_while_they_load(family: str) -> None:
    cases = FAMILY_OF[family]
    checkpoint = as_checkpoint(cases.tiny(next(iter(cases.variants))))
    decoder, ours = load(checkpoint, quantization="int8")
    found = ours.step([(0, prompt(40))])
    expected = logits(checkpoint)
    # Rounding errors (which also make a router choose others), and not those of rows in the wrong order.
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.1
    plain = {path for path, scheme in schemes(decoder).items() if isinstance(scheme, Unquantized)}
    assert plain <= {"head", *(path for path in plain if path.endswith("router"))}


def test_packed_rows_are_not_brought_out_of_another_order() -> None:
    cases = FAMILY_OF["GPT-NeoX"]
    checkpoint = as_checkpoint(cases.tiny(next(iter(cases.variants)), **SIZES))
    with pytest.raises(CheckpointError, match=r"query_key_value'.*order of rows.*--quantization int8"):
        load(packed(checkpoint, CASES["GPTQ"].packer, config=GPTQ)[0])


Damage = Callable[[MemoryCheckpoint], object]
Q = "model.layers.0.self_attn.q_proj"


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    def damage(checkpoint: MemoryCheckpoint) -> None:
        changed = change(checkpoint.tensors.pop(f"{Q}.{name}"))
        if changed is not None:
            checkpoint.tensors[f"{Q}.{name}"] = changed

    return damage


def setting(**keys: Any) -> Damage:
    return lambda checkpoint: checkpoint.hf_config["quantization_config"].update(keys)


def weights_setting(**keys: Any) -> Damage:
    def damage(checkpoint: MemoryCheckpoint) -> None:
        group = checkpoint.hf_config["quantization_config"]["config_groups"]["group_0"]
        group["weights"] = group["weights"] | keys

    return damage


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "codes of another shape": ("GPTQ", tensor("qweight", lambda t: t[:-1]), rf"'{Q}.qweight' has shape"),
    "codes of another type": ("GPTQ", tensor("qweight", lambda t: t.float()), "holds float32, not int32"),
    "no scales": ("GPTQ", tensor("scales", lambda t: None), rf"'{Q}.scales' is missing"),
    "scales of NaN": ("AWQ", tensor("scales", lambda t: t * torch.nan), rf"'{Q}.scales'.*not all finite"),
    "a symmetric one with zeros": (
        "GPTQ",
        tensor("qzeros", lambda t: t + 1),
        "zeros are not all 8, though the configuration says that it is symmetric",
    ),
    "groups that do not divide": ("GPTQ", setting(group_size=48), "groups of 48 do not divide 64 inputs"),
    "groups that nothing multiplies": ("GPTQ", setting(group_size=16), "groups of 16 are not multiplied"),
    "a group out of range": (
        "GPTQ, act-order",
        tensor("g_idx", lambda t: t + 1),
        "groups of inputs are 1 to 2, but there are only 0 to 1",
    ),
    "groups of unequal size": ("GPTQ, act-order", tensor("g_idx", lambda t: t * 0), "not of 32 inputs each"),
    "parts in different orders": (
        "GPTQ, act-order",
        tensor("g_idx", lambda t: t.flip(0)),
        "differs from that of another layer over the same input",
    ),
    "an order of which nothing is said": (
        "GPTQ, act-order",
        setting(desc_act=False),
        "have an order, of which the configuration says nothing",
    ),
    "a bias of nowhere": (
        "GPTQ",
        lambda checkpoint: checkpoint.tensors.update({f"{Q}.bias": torch.ones(64)}),
        rf"'{Q}.bias': it is not zero, though the model has no such bias",
    ),
    "parts stored differently": (
        "GPTQ",
        lambda checkpoint: (
            checkpoint.tensors.pop(f"{Q}.qweight"),
            checkpoint.tensors.update({f"{Q}.weight": torch.ones(64, 64)}),
        ),
        rf"'{Q}' is stored unquantized and '.*k_proj' as GPTQ, 4 bits in groups of 32; they are parts",
    ),
    "plain numbers beside packed ones": (
        "GPTQ",
        lambda checkpoint: checkpoint.tensors.update({f"{Q}.weight": torch.ones(64, 64)}),
        rf"'{Q}.weight' is not used",
    ),
    "codes of no size": ("AWQ", tensor("qweight", lambda t: t[:0]), rf"'{Q}.qweight' has shape \[0, 8\]"),
    "an infinite scale": (
        "compressed-tensors",
        tensor("weight_scale", lambda t: t.index_fill(0, torch.tensor([3]), torch.inf)),
        rf"'{Q}.weight_scale'.*not all finite",
    ),
    "scales of integers": ("GPTQ", tensor("scales", lambda t: t.int()), rf"'{Q}.scales' holds int32"),
    "zeros of another shape": ("AWQ", tensor("qzeros", lambda t: t.t().contiguous()), "qzeros' has shape"),
    "a method of tomorrow": ("GPTQ", setting(quant_method="quip"), "quant_method' is 'quip', not one of awq"),
    "no method": ("GPTQ", setting(quant_method=None), "quant_method' is missing; it should be one of awq"),
    "a method that is not the tensors'": (
        "AWQ",
        setting(quant_method="gptq", version=None, zero_point=None),
        r"down_proj.g_idx', .* are missing",
    ),
    "a group below zero": ("AWQ", setting(group_size=-2), "'quantization_config.group_size' is -2, not -1"),
    "older kernels' packing": ("GPTQ", setting(is_marlin_format=True), "is_marlin_format' is True"),
    "three bits": ("GPTQ", setting(bits=3), "'quantization_config.bits' is 3; only 4 and 8"),
    "two bits": ("GPTQ", setting(bits=2), "'quantization_config.bits' is 2; only 4 and 8"),
    "a group that is no number": (
        "GPTQ",
        setting(group_size="all"),
        "'quantization_config.group_size' is 'all'",
    ),
    "a format of tomorrow": ("GPTQ", setting(checkpoint_format="gptq_v3"), "checkpoint_format' is 'gptq_v3'"),
    "a key of unknown meaning": ("GPTQ", setting(twist=1), "'quantization_config.twist' .* not understood"),
    "a pattern that is none": ("GPTQ", setting(dynamic={"+:[": {"bits": 8}}), "is no regular expression"),
    "AWQ for vectors": ("AWQ", setting(version="gemv"), "version' is 'gemv'; only the packing 'gemm'"),
    "AWQ without zeros": ("AWQ", setting(zero_point=False), "'quantization_config.zero_point' is False"),
    "AWQ of 3 bits": ("AWQ", setting(bits=3), "'quantization_config.bits' is 3; only 4"),
    "a format for other cards": (
        "compressed-tensors",
        setting(format="nvfp4-pack-quantized"),
        "format' is 'nvfp4-pack-quantized'; pack-quantized",
    ),
    "a shape that contradicts": (
        "compressed-tensors",
        tensor("weight_shape", lambda t: t + 1),
        r"'weight_shape' is \[65, 65\], not \[64, 64\]",
    ),
    "compressed weights of 3 bits": ("compressed-tensors", weights_setting(num_bits=3), "num_bits' is 3"),
    "floats with plain activations": (
        "compressed-tensors",
        weights_setting(type="float", num_bits=8),
        "weights.type' is float, with activations that are not rounded",
    ),
    "blocks of integers": ("compressed-tensors", weights_setting(strategy="block"), "strategy' is 'block'"),
    "weights rounded at run time": ("compressed-tensors", weights_setting(dynamic=True), "dynamic' is true"),
    "scales for the cache": (
        "compressed-tensors",
        setting(kv_cache_scheme={"num_bits": 8}),
        "kv_cache_scheme'",
    ),
    "a target that is no pattern": ("compressed-tensors", setting(ignore=["re:("]), "no regular expression"),
    "a transform": (
        "compressed-tensors",
        setting(transform_config={"a": 1}),
        "'.*transform_config' is not empty",
    ),
    "groups without modules": ("compressed-tensors", setting(config_groups={}), "names no group of modules"),
}


@pytest.mark.parametrize(("name", "damage", "complaint"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_packing_is_refused_by_name(name: str, damage: Damage, complaint: str) -> None:
    case = CASES[name]
    checkpoint, _ = packed(as_checkpoint(tiny_llama(**SIZES)), case.packer, config=dict(case.config))
    config = checkpoint.hf_config["quantization_config"]
    if "config_groups" in config:
        config["config_groups"] = {name: dict(group) for name, group in config["config_groups"].items()}
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load(checkpoint)
    assert str(checkpoint.path) in caught.value.message
