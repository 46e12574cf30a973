"""What has no declaration runs through transformers' module with our paged attention, or is refused."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.models.arcee.modeling_arcee import ArceeMLP

from graphllm.attention.backend import AttentionSpec
from graphllm.attention.paged import PagedAttention
from graphllm.config import EngineConfig, PlanConfig
from graphllm.engine.planning import plan_capacity
from graphllm.errors import CheckpointError, ConfigError
from graphllm.llm import LLM
from graphllm.models.checkpoint import open_checkpoint, open_model
from graphllm.models.registry import FAMILIES
from graphllm.models.transformers_attention import AbsentAttention, AttentionOutline, UnservableAttention
from graphllm.models.transformers_fallback import Fallback, find_fallback
from graphllm.sampling_params import SamplingParams
from tests.models.equality import TOLERANCE, error, prompt, theirs
from tests.models.memory_checkpoint import STANDARD_DEVIATION
from tests.models.paged_model import BLOCK_SIZE, PagedModel
from tests.models.small_gguf import write_small_llama
from tests.tiny_model import write_tiny_model

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
# Architecture, without the words that all share, and what its configuration has beside TINY.
SERVED: dict[str, dict[str, Any]] = {
    "Arcee": {},
    "Apertus": {},
    "Cwm": {**WINDOWS},
    "Ernie4_5": {"tie_word_embeddings": True},
    "Exaone4": {**WINDOWS},
    "Helium": {"head_dim": 12},
    "NanoChat": {},
    "Nemotron": {},
    "Olmo": {"clip_qkv": 0.5},
    "Persimmon": {"num_key_value_heads": 4},
    "HunYuanDenseV1": {"head_dim": 16},
    # Experts, which published files keep one by one and modules together.
    "Afmoe": EXPERTS | {"num_experts": 4, "num_dense_layers": 1, "head_dim": 20, **WINDOWS},
    "Ernie4_5_Moe": EXPERTS | {"moe_num_experts": 11, "moe_k": 2, "moe_layer_start_index": 1},
    "Phimoe": {"num_local_experts": 4},
    # Keys wider than values, and values wider than keys.
    "MiniCPM3": LATENT | {"q_lora_rank": 24, "v_head_dim": 8},
    "Glm4MoeLite": LATENT | EXPERTS | {"n_routed_experts": 4, "q_lora_rank": None, "v_head_dim": 20},
    # A head that asks its model for attention to something else.
    "GPTBigCode": {"n_inner": 80},
    # Declared, but the only ones with a cap on scores and with a multiplier behind the head.
    "Gemma2": {**WINDOWS, "head_dim": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20},
    "Cohere": {"logit_scale": 0.3, "tie_word_embeddings": True},
}
DECLARED = {"Gemma2", "Cohere"}


def tiny(name: str, **config: Any) -> PreTrainedModel:
    """A random model of an architecture, every parameter redrawn."""
    model_class = getattr(transformers, f"{name}ForCausalLM")
    settings = TINY | SERVED.get(name, {}) | config
    model = model_class._from_config(model_class.config_class(**settings), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    for path, weight in model.named_parameters():
        offset = (
            1.0 if "norm" in path and path.endswith("weight") and name not in ("Gemma2", "Nemotron") else 0.0
        )
        weight.data = torch.randn(weight.shape, generator=generator) * STANDARD_DEVIATION + offset
    return model  # type: ignore[no-any-return]


def save(model: PreTrainedModel, folder: Path, **config: Any) -> Path:
    model.save_pretrained(folder)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def fallback(folder: Path, *, model_impl: str = "auto", trust_remote_code: bool = False) -> Fallback:
    found = find_fallback(open_checkpoint(folder), model_impl=model_impl, trust_remote_code=trust_remote_code)
    assert found is not None
    return found


def paged(found: Fallback) -> PagedModel:
    backend = PagedAttention(block_size=BLOCK_SIZE)
    model: Any = found.load(backend=backend, device=torch.device("cpu"), dtype=torch.float32)
    return PagedModel(model, backend)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        paged(fallback(folder, **options))
    assert str(folder) in caught.value.message
    return caught.value.message


@pytest.fixture(scope="module", params=SERVED)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Fallback]:
    """transformers' own eager run, and the fallback on the same checkpoint."""
    model = tiny(request.param)
    folder = save(model, tmp_path_factory.mktemp(request.param))
    return model, fallback(folder, model_impl="transformers" if request.param in DECLARED else "auto")


def test_logits_are_those_of_transformers_in_every_split(both: tuple[PreTrainedModel, Fallback]) -> None:
    model, found = both
    token_ids, ours = prompt(60), paged(found)
    expected = theirs(model, token_ids)
    assert error(ours.step([(0, token_ids)]), expected) < TOLERANCE, "in one prefill"
    chunks = [ours.step([(1, token_ids[start : start + 17])]) for start in range(0, 60, 17)]
    assert error(torch.cat(chunks), expected) < TOLERANCE, "in chunks"
    ours.step([(2, token_ids[:55])])
    decoded = [ours.step([(2, [token_id])], num_decode_rows=1) for token_id in token_ids[55:]]
    assert error(torch.cat(decoded), expected[55:]) < TOLERANCE, "token by token"


def test_rows_of_a_mixed_batch_do_not_see_each_other(both: tuple[PreTrainedModel, Fallback]) -> None:
    model, found = both
    ours = paged(found)
    prompts = [prompt(length, seed=length) for length in (1, 4, 5, 30)]
    for slot, token_ids in enumerate(prompts):
        ours.step([(slot, token_ids)])
    rows = [(slot, prompt(1, seed=50 + slot)) for slot in (3, 0, 1)]
    rows += [(2, prompt(6, seed=60)), (4, prompt(20, seed=61))]
    logits, start = ours.step(rows, num_decode_rows=3), 0
    for slot, token_ids in rows:
        earlier = prompts[slot] if slot < 4 else []
        expected = theirs(model, earlier + token_ids)[len(earlier) :]
        assert error(logits[start : start + len(token_ids)], expected) < TOLERANCE, f"slot {slot}"
        start += len(token_ids)


def test_greedy_tokens_are_those_of_transformers(both: tuple[PreTrainedModel, Fallback]) -> None:
    model, found = both
    ours, token_ids = paged(found), prompt(20, seed=3)
    logits = ours.step([(0, token_ids)])[-1]
    for _ in range(6):
        best, runner_up = theirs(model, token_ids)[-1].topk(2).values
        if best - runner_up > 1e-3:
            assert int(logits.argmax()) == int(theirs(model, token_ids)[-1].argmax())
        token_ids.append(int(logits.argmax()))
        logits = ours.step([(0, token_ids[-1:])], num_decode_rows=1)[0]


def test_every_served_module_may_be_captured_and_computes_the_same_after_the_question(
    both: tuple[PreTrainedModel, Fallback],
) -> None:
    model, found = both
    ours = paged(found)
    assert ours.model.find_capture_obstacle() is None  # type: ignore[attr-defined]
    assert error(ours.step([(0, prompt(20))]), theirs(model, prompt(20))) < TOLERANCE


def test_a_module_that_no_graph_may_hold_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = paged(fallback(save(tiny("Arcee"), tmp_path / "model")))
    forward = ArceeMLP.forward
    monkeypatch.setattr(ArceeMLP, "forward", lambda mlp, x: forward(mlp, x) + 0 * torch.rand_like(x))
    obstacle = ours.model.find_capture_obstacle()  # type: ignore[attr-defined]
    assert obstacle == "it draws random numbers (aten.rand_like.default)"


def test_they_have_no_declaration() -> None:
    declared = {name for family in FAMILIES for name in family.architectures}
    undeclared = {name for name in SERVED if f"{name}ForCausalLM" not in declared}
    assert len(undeclared) >= 12, "take other architectures that transformers has and we have not"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Exaone4", {"sliding_window": None}),
        ("Gemma2", {"softcap": None}),
        ("Gemma2", {"scale": 0.25}),
    ],
)
def test_a_fallback_that_ignores_what_the_module_asks_for_fails(
    tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    model = tiny(name)
    found = fallback(save(model, tmp_path / "model"), model_impl="transformers")
    mutant = replace(found, specs=tuple(replace(spec, **change) for spec in found.specs))
    assert error(paged(mutant).step([(0, prompt(60))]), theirs(model, prompt(60))) > 100 * TOLERANCE


def test_the_outline_has_each_layers_own_attention(tmp_path: Path) -> None:
    found = fallback(save(tiny("Exaone4"), tmp_path / "model"))
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=12, scale=12**-0.5)
    assert found.specs[1] == spec
    assert found.specs[0].sliding_window == 9
    config = found.config
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (2, 2, 12)
    assert (config.vocab_size, config.hidden_size, config.max_position_embeddings) == (97, 48, 512)


def chunks(num_tokens: int, size: int) -> torch.Tensor:
    """A mask of chunks that don't see each other, as Llama 4 has them."""
    places = torch.arange(num_tokens)
    return ((places[:, None] >= places) & (places[:, None] // size == places // size))[None, None]


@pytest.mark.parametrize(
    ("mask", "arguments", "reason"),
    [
        (chunks(7, 3), {}, "neither causal nor the sliding window"),
        (chunks(7, 7), {"sliding_window": 3}, "neither causal nor the sliding window"),
        (None, {"is_causal": False}, "not causal"),
        (None, {"position_bias": torch.ones(1)}, "attention takes position_bias"),
        (None, {"scaling": torch.ones(1)}, "computed in every step"),
    ],
)
def test_attention_that_the_paged_one_would_compute_otherwise_is_noticed(
    mask: torch.Tensor | None, arguments: dict[str, Any], reason: str
) -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    query, key = torch.ones(1, 4, 7, 8), torch.ones(1, 2, 7, 8)
    outline = AttentionOutline()
    outline.attend(module, query, key, key, mask=chunks(7, 7), arguments={"dropout": 0.0})
    with pytest.raises(UnservableAttention, match=reason):
        outline.attend(module, query, key, key, mask=mask, arguments=arguments)
    with pytest.raises(UnservableAttention, match="not as many keys as values"):
        outline.attend(module, query, key, key[:, :1], mask=None, arguments={})
    assert len(outline.specs) == 1
    with pytest.raises(UnservableAttention, match="choose by themselves what a token sees"):
        AbsentAttention().attend(module, query, key, key, mask=chunks(7, 7), arguments={})


# What is no decoder with the paged attention's mathematics: configuration beside TINY, and the reason.
UNSERVED: dict[str, tuple[dict[str, Any], str]] = {
    "Bloom": ({"n_head": 4, "n_layer": 2}, "its module does not run with another attention"),
    "GPTJ": ({"n_embd": 48, "n_head": 4, "n_layer": 2, "rotary_dim": 4}, "does not run with another"),
    "Mamba": ({"state_size": 4}, "architecture 'MambaForCausalLM' is not supported"),
    "Llama4": ({"attention_chunk_size": 4, "num_local_experts": 2, "head_dim": 12}, "is not supported"),
    "DiffLlama": ({}, "of its 2 layers call transformers' attention interface"),
    "Zaya": ({"num_experts": 4, "num_experts_per_tok": 1, "head_dim": 12}, "carry more from token to token"),
    "XLMRoberta": ({"is_decoder": True}, "its positions do not count from 0"),
}


@pytest.mark.parametrize(("name", "config", "reason"), [(name, *case) for name, case in UNSERVED.items()])
def test_what_cannot_be_served_is_refused_by_name(
    tmp_path: Path, name: str, config: dict[str, Any], reason: str
) -> None:
    message = refusal(save(tiny(name, **config), tmp_path / "model"))
    assert f"architecture '{name}ForCausalLM' is not supported" in message
    assert reason in message


def test_turning_that_depends_on_the_batch_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = save(tiny("Arcee"), tmp_path / "model", rope_parameters=rope)
    assert "rotary type 'dynamic' depends on what else is in the batch" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "it has 1000000000 layers"),
        ({"hidden_size": 2**30}, "the configuration asks for"),
        ({"hidden_size": "wide"}, "its configuration is refused"),
        ({"max_position_embeddings": 0}, "'max_position_embeddings' is 0, not a number of tokens"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"model_type": ["arcee"]}, "has a language model of that name"),
    ],
)
def test_a_damaged_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal(save(tiny("Arcee"), tmp_path / "model", **changes))


def test_an_unheard_of_architecture_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(tiny("Arcee"), tmp_path / "model", architectures=["UnheardOfForCausalLM"])
    assert "architecture 'UnheardOfForCausalLM' is not supported: neither graphllm nor" in refusal(folder)


REMOTE = """
import pathlib
pathlib.Path(__file__).with_name("it_ran").touch()
from transformers import ArceeConfig, ArceeForCausalLM
class MyConfig(ArceeConfig):
    model_type = "mine"
class MyForCausalLM(ArceeForCausalLM):
    config_class = MyConfig
"""


def test_code_of_the_checkpoint_runs_only_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = tiny("Arcee")
    auto_map = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyForCausalLM"}
    folder = save(
        model, tmp_path / "model", architectures=["MyForCausalLM"], model_type="mine", auto_map=auto_map
    )
    (folder / "mine.py").write_text(REMOTE)
    assert "it brings code of its own, which runs with --trust-remote-code only" in refusal(folder)
    assert not [*tmp_path.rglob("it_ran")]
    found = fallback(folder, trust_remote_code=True)
    assert [*modules.rglob("it_ran")]
    assert error(paged(found).step([(0, prompt(30))]), theirs(model, prompt(30))) < TOLERANCE


def test_auto_map_of_a_known_architecture_runs_nothing(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "mine.MyForCausalLM"}
    folder = save(tiny("Arcee"), tmp_path / "model", auto_map=auto_map)
    (folder / "mine.py").write_text(REMOTE)
    assert fallback(folder, trust_remote_code=True).model_class is transformers.ArceeForCausalLM
    assert not [*tmp_path.rglob("it_ran")]


def test_tensors_are_accounted_for_as_strictly_as_ours(tmp_path: Path) -> None:
    folder = save(tiny("Arcee"), tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, reason in (
        ({key: value for key, value in stored.items() if key != name}, f"tensor {name!r} is missing"),
        ({**stored, "model.other": torch.ones(1)}, "tensor 'model.other' is not used by ArceeForCausalLM"),
        (
            {**stored, name: torch.ones(3, 48)},
            f"tensor {name!r} has shape [3, 48]; the configuration asks for",
        ),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert reason in refusal(folder)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file({**stored, **frequencies}, folder / "model.safetensors", metadata={"format": "pt"})
    paged(fallback(folder))


def test_experts_are_accounted_for_one_by_one(tmp_path: Path) -> None:
    """The module has them in one tensor: a gap would shift all behind it."""
    folder = save(tiny("Ernie4_5_Moe"), tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    gate = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    assert stored[gate.format(10)].shape == (32, 48)
    without_last = {key: value for key, value in stored.items() if key != gate.format(10)}
    for changed, reason in (
        (
            {key: value for key, value in stored.items() if key != gate.format(0)},
            f"{gate.format(0)!r} is miss",
        ),
        (
            {key: value for key, value in stored.items() if key != gate.format(2)},
            f"{gate.format(2)!r} is miss",
        ),
        (without_last, f"{gate.format(0)!r}, "),
        ({**stored, gate.format(11): torch.ones(32, 48)}, f"{gate.format(0)!r}, "),
        ({**stored, gate.format(1): torch.ones(32, 47)}, f"{gate.format(0)!r}, "),
        ({**stored, gate.format(1): torch.ones(32, 48, dtype=torch.int8)}, f"{gate.format(1)!r} holds int8"),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert reason in refusal(folder)


def test_a_tensor_of_two_names_is_refused(tmp_path: Path) -> None:
    folder = save(tiny("Arcee"), tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    twice = {**stored, "norm.weight": stored["model.norm.weight"].clone()}
    save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
    assert "'model.norm.weight', 'norm.weight' are both 'model.norm.weight'" in refusal(folder)


def test_who_computes_is_chosen_by_the_flag(tmp_path: Path) -> None:
    llama = open_checkpoint(write_tiny_model(tmp_path / "llama"))
    undeclared = open_checkpoint(save(tiny("Arcee"), tmp_path / "arcee"))
    gguf = open_checkpoint(write_small_llama(tmp_path / "m.gguf"))
    for checkpoint, model_impl, is_fallback in (
        (llama, "auto", False),
        (llama, "graphllm", False),
        (llama, "transformers", True),
        (undeclared, "auto", True),
        (undeclared, "graphllm", False),
        (gguf, "auto", False),
    ):
        found = find_fallback(checkpoint, model_impl=model_impl, trust_remote_code=False)
        assert (found is not None) == is_fallback
    with pytest.raises(ConfigError, match="serves folders with safetensors only"):
        find_fallback(gguf, model_impl="transformers", trust_remote_code=False)


@pytest.mark.parametrize(
    ("architecture", "model_type", "model_impl"),
    [("ArceeForCausalLM", "arcee", "auto"), ("LlamaForCausalLM", "llama", "transformers")],
)
def test_without_weights_it_is_said_that_only_declared_families_are_known(
    tmp_path: Path, architecture: str, model_type: str, model_impl: str
) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**TINY, "architectures": [architecture], "model_type": model_type}))
    asked = " (--model-impl transformers)" if model_impl == "transformers" else ""
    said = f"{path}: architecture '{architecture}' would run through transformers' own module{asked}; "
    with pytest.raises(ConfigError) as of_dummy:
        find_fallback(open_model(path, "dummy"), model_impl=model_impl, trust_remote_code=False)
    assert of_dummy.value.message.startswith(f"{said}--load-format dummy draws weights of families")
    with pytest.raises(ConfigError) as of_plan:
        plan_capacity(EngineConfig(model=str(path), model_impl=model_impl), PlanConfig(gpu="h100"))
    assert of_plan.value.message.startswith(f"{said}`graphllm plan` knows the memory of families")


def test_what_nobody_knows_is_said_to_be_unknown_without_weights_too(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**TINY, "architectures": ["UnheardOfForCausalLM"], "model_type": "x"}))
    with pytest.raises(CheckpointError, match=r"'UnheardOfForCausalLM' is not supported; .*LlamaForCausalLM"):
        plan_capacity(EngineConfig(model=str(path)), PlanConfig(gpu="h100"))


def test_without_transformers_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny("Arcee"), tmp_path / "model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"'ArceeForCausalLM', and the fallback needs .* pip install"):
        fallback(folder)


def test_the_engine_serves_through_it_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tiny_model(tmp_path / "model")
    prompts = ["a first text", "and another, longer one", "x"]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    token_ids = {}
    with caplog.at_level(logging.WARNING):
        for model_impl in ("graphllm", "transformers"):
            with LLM(str(folder), model_impl=model_impl, cpu_threads=1) as llm:
                outputs = llm.generate(prompts, params, use_tqdm=False)
                token_ids[model_impl] = [output.outputs[0].token_ids for output in outputs]
    assert token_ids["transformers"] == token_ids["graphllm"]
    assert "LlamaForCausalLM runs through transformers' own module" in caplog.text
