"""Adapters of models published for vectors and scores, mixed in a batch: what peft computes, pooled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from graphllm.errors import CheckpointError
from graphllm.runner.device import CpuDevice
from tests.engine.harness import assert_nothing_held, ended, running_engine, settle
from tests.engine.peft_oracle import PEFT_WARNINGS
from tests.engine.test_pooling import Pooled
from tests.engine.test_text_pooling import WAYS, pooled_model, prompt
from tests.pooled_models import hidden_states, write_model

pytestmark = PEFT_WARNINGS

LENGTHS = (40, 3, 90, 17)
ADAPTERS: dict[str, dict[str, Any]] = {"a": {"r": 4, "lora_alpha": 8}, "b": {"r": 7, "lora_alpha": 5}}
# A decoder whose names have no prefix, one whose queries see all, and an encoder.
MODELS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "last": ("Qwen3Model", "last", {}, ["q_proj", "v_proj", "down_proj"]),
    "sees all": ("Qwen3Model", "mean", {"is_causal": False}, ["k_proj", "o_proj", "gate_proj"]),
    "encoder": ("BertModel", "mean", {}, ["query", "value", "attention.output.dense", "intermediate.dense"]),
}


def adapted(folder: Path, architecture: str, adapter: Path, *, seed: int, **config: Any) -> Any:
    """transformers' model with a random adapter of peft's, which is written too."""
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    found = get_peft_model(model, LoraConfig(**config))
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    found.save_pretrained(adapter)
    return found.eval()


@pytest.mark.parametrize("case", MODELS)
def test_vectors_are_those_of_the_adapter_that_each_text_names(case: str, tmp_path: Path) -> None:
    architecture, way, keys, targets = MODELS[case]
    folder = tmp_path / "model"
    references = {None: pooled_model(folder, architecture, way, **keys)}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        of_name = {"target_modules": targets[seed:], "task_type": "FEATURE_EXTRACTION", **config}
        references[name] = adapted(folder, architecture, tmp_path / name, seed=seed, **of_name)
    modules = tuple(f"{name}={tmp_path / name}" for name in ADAPTERS)

    async def run() -> None:
        flags = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "max_model_len": 128, "debug_kv": True}
        flags |= {"lora_modules": modules, "max_loras": 1}
        async with running_engine(folder, device=CpuDevice(1), **flags) as engine:
            asked = [(name, prompt(length, seed=length)) for length in LENGTHS for name in references]
            sinks = [
                Pooled(engine, f"r{index}", token_ids, lora=name)
                for index, (name, token_ids) in enumerate(asked)
            ]
            await ended(*sinks)
            base = WAYS[way][1](hidden_states(references[None], asked[0][1]))
            for sink, (name, token_ids) in zip(sinks, asked, strict=True):
                expected = WAYS[way][1](hidden_states(references[name], token_ids))
                torch.testing.assert_close(torch.tensor(sink.embedding), expected, rtol=0, atol=1e-4)
                if name is not None and token_ids == asked[0][1]:
                    assert (expected - base).norm() > 0.1 * base.norm(), "it changes little"
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())


def test_an_adapter_that_brings_a_classifier_of_its_own_is_refused(tmp_path: Path) -> None:
    """As peft writes all that are trained to classify."""
    folder, architecture = tmp_path / "model", "BertForSequenceClassification"
    write_model(folder, architecture, num_labels=3)
    adapted(folder, architecture, tmp_path / "a", seed=0, task_type="SEQ_CLS", target_modules=["query"])

    async def run() -> None:
        async with running_engine(folder, lora_modules=(f"a={tmp_path / 'a'}",)):
            """It does not start."""

    with pytest.raises(CheckpointError, match=r"--lora-modules a: .*'modules_to_save' is set"):
        asyncio.run(run())
