"""Adapters on several families: what peft computes beside each layer, and what layers are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from graphllm.arena import Arena
from graphllm.layers.lora import AdapterMemory, TokenAdapters
from graphllm.models.adaptable import adaptable_layers
from graphllm.models.adapter_names import AdapterNames
from graphllm.models.lora import AdapterFolder
from graphllm.models.registry import find_family
from tests.models.equality import TOLERANCE, error, paged, prompt, theirs
from tests.models.families import FALCON, GEMMA3, GPT2, LLAMA, OPT, PHI3, FamilyCases
from tests.models.memory_checkpoint import as_checkpoint
from tests.models.moe_families import DEEPSEEK_V3, MIXTRAL, QWEN2_MOE
from tests.models.paged_model import PagedModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # Of layers that one family has and another has not.
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),
]

MAX_RANK = 8
# A merged layer stored merged, no gate and a prefix that files leave out, windows with head norms, attention
# beside experts, latents. Beside experts peft takes layers of attention only.
FAMILIES = (LLAMA, PHI3, OPT, GEMMA3, QWEN2_MOE, DEEPSEEK_V3)


def tiny(cases: FamilyCases) -> PreTrainedModel:
    return cases.tiny(next(iter(cases.variants)))


def names_of(model: PreTrainedModel, ours: PagedModel) -> AdapterNames:
    return AdapterNames(ours.model, find_family(as_checkpoint(model)))


def adapted(model: PreTrainedModel, targets: list[str], folder: Path) -> PreTrainedModel:
    """The same model with a random adapter on these layers, which is written to the folder."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern={r".*\.[oq]_proj": 7})
    found = get_peft_model(model, config)
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    found.save_pretrained(folder, save_embedding_layers=False)
    return found.eval()


def put_on(ours: PagedModel, folder: AdapterFolder) -> TokenAdapters:
    """The adapter in the first of two places, and every token to have it."""
    tokens = TokenAdapters(torch.zeros(128, dtype=torch.int32), Arena(torch.device("cpu")))
    memory = AdapterMemory(
        adaptable_layers(ours.model), max_loras=2, max_rank=MAX_RANK, dtype=torch.float32, tokens=tokens
    )
    memory.memory[1].fill_(0xFF)  # NaN, as far as it is read as numbers
    image = torch.full((memory.layout.num_bytes,), 0xFF, dtype=torch.uint8)
    for _ in folder.read_in_slices(image, memory.layout):
        pass
    memory.upload(image, 0)
    tokens.in_play = True
    return tokens


@pytest.mark.parametrize("cases", FAMILIES, ids=lambda cases: cases.name)
def test_adapters_change_every_layer_as_peft_does(cases: FamilyCases, tmp_path: Path) -> None:
    model = tiny(cases)
    ours = paged(model)
    names = names_of(model, ours)
    modules = {name for name, _ in model.named_modules()}
    targets = sorted({target.name for target in names.targets.values()} & modules)
    if any("experts" in name for name in modules):
        targets = [name for name in targets if ".mlp." not in name]
    assert len(targets) >= 2 * model.config.num_hidden_layers
    token_ids = prompt(40)
    without = theirs(model, token_ids)
    expected = theirs(adapted(model, targets, tmp_path / "adapter"), token_ids)
    assert error(without, expected) > 100 * TOLERANCE, "it changes a lot"
    tokens = put_on(ours, AdapterFolder(tmp_path / "adapter", names, max_rank=MAX_RANK))
    assert error(ours.step([(0, token_ids)]), expected) < TOLERANCE
    ours.step([(1, token_ids[:36])])
    decoded = [ours.step([(1, [token_id])], num_decode_rows=1) for token_id in token_ids[36:]]
    assert error(torch.cat(decoded), expected[36:]) < TOLERANCE
    tokens.of_tokens.fill_(-1)
    assert error(ours.step([(2, token_ids)]), without) < TOLERANCE, "the base model is as it was"


@pytest.mark.parametrize(
    ("form", "accuracy"), [("int8", 1e-3), ("int4", 1e-3), ("fp8", 0.2)], ids=["int8", "int4", "fp8"]
)
def test_adapters_are_added_to_what_quantized_layers_give(form: str, accuracy: float, tmp_path: Path) -> None:
    """As to a plain model of the same numbers. FP8 rounds what its layers are given, too."""
    model = tiny(LLAMA)
    ours, same = paged(model, quantization=form), paged(model)
    for path, layer in adaptable_layers(ours.model).items():
        rows = layer.scheme.dequantized_rows(layer, 0, layer.out_features, dtype=torch.float32)
        plain = same.model.get_submodule(path).get_parameter("weight")
        assert not torch.equal(rows, plain), "it is quantized"
        plain.data.copy_(rows)
    names, token_ids = names_of(model, ours), prompt(40)
    adapted(model, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"], tmp_path / "adapter")
    without = ours.step([(0, token_ids)])
    for each in (ours, same):
        put_on(each, AdapterFolder(tmp_path / "adapter", names, max_rank=MAX_RANK))
    found, expected = ours.step([(1, token_ids)]), same.step([(1, token_ids)])
    assert error(found, expected) < accuracy * error(without, expected)


@pytest.mark.parametrize(
    ("cases", "layer", "reason"),
    [
        (GPT2, "transformer.h.0.attn.c_attn", "keeps in another order"),
        (FALCON, "transformer.h.1.self_attention.query_key_value", "keeps in another order"),
        (MIXTRAL, "model.layers.0.mlp.experts.gate_up_proj", "experts are not served"),
        (DEEPSEEK_V3, "model.layers.0.self_attn.kv_b_proj", "computes with inside the latent"),
        (LLAMA, "lm_head", "an embedding or a head"),
        (LLAMA, "model.embed_tokens", "an embedding or a head"),
        (LLAMA, "model.norm", "no linear layer of this model"),
        (LLAMA, "model.layers.9.self_attn.q_proj", "no linear layer of this model"),
    ],
    ids=lambda value: value.name if isinstance(value, FamilyCases) else value,
)
def test_layers_that_can_have_no_adapter_are_refused_by_name(
    cases: FamilyCases, layer: str, reason: str
) -> None:
    model = tiny(cases)
    names = names_of(model, paged(model))
    assert layer not in names.targets
    assert reason in names.refusal(layer)


def test_a_layer_stored_merged_is_all_parts_and_a_part_is_its_rows() -> None:
    whole = tiny(PHI3)
    target = names_of(whole, paged(whole)).targets["model.layers.0.self_attn.qkv_proj"]
    config = whole.config
    head_dim = config.hidden_size // config.num_attention_heads
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * head_dim
    assert (target.parts, target.start, target.end) == ((0, 1, 2), 0, rows)
    apart = tiny(LLAMA)
    target = names_of(apart, paged(apart)).targets["model.layers.1.self_attn.k_proj"]
    first = apart.config.num_attention_heads * apart.config.head_dim
    second = first + apart.config.num_key_value_heads * apart.config.head_dim
    assert (target.path, target.parts) == ("layers.1.attention.qkv", (1,))
    assert (target.start, target.end) == (first, second)
