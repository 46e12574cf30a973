"""Models with experts on captured steps: the tokens of the same kernels launched one by one.

Which experts a step uses, and how many tiles, is in no graph: replays of one graph route other tokens. One
model has latent attention as well, whose cache and products are its own.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from graphllm.runner.device import Device, InlineDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import add, assert_nothing_held, ended, running_engine, settle
from tests.runner.recording_device import RecordingDevice

# Minutes on a busy machine: every launch of every step goes through the interpreter.
pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 2,  # one layer of each kind
    "hidden_size": 48,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "shared_expert_intermediate_size": 24,
    "tie_word_embeddings": False,
    "vocab_size": 300,
}
LATENT_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 0,
    "hidden_size": 48,
    "intermediate_size": 40,
    "kv_lora_rank": 20,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "v_head_dim": 12,
    "vocab_size": 300,
}
FLAGS: dict[str, Any] = {
    "load_format": "dummy",
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 200_000,
    "cudagraph_capture_sizes": (1, 2),
}
PROMPTS = [[7, 8, 9], list(range(20))]


@pytest.fixture(scope="module", params=[CONFIG, LATENT_CONFIG], ids=["heads", "latents"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe.json"
    path.write_text(json.dumps(request.param))
    return path


async def tokens_of_all(model: Path, device: Device, **flags: Any) -> tuple[list[list[list[int]]], int]:
    """The requests' tokens, and how often a graph was replayed."""
    async with running_engine(model, device=device, **FLAGS, **flags) as engine:
        collectors = []
        for index, prompt in enumerate(PROMPTS):
            params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
            collectors.append(add(engine, f"r{index}", prompt, params))
            for _ in range(3):
                await asyncio.sleep(0)
        await ended(*collectors)
        await settle(engine)
        assert_nothing_held(engine)
        return [
            collector.token_ids for collector in collectors
        ], engine._loaded.model.runner.graphs.num_replays


def test_replayed_steps_give_the_tokens_of_steps_without_graphs(model: Path) -> None:
    expected, num_replays = asyncio.run(tokens_of_all(model, InlineDevice()))
    assert num_replays == 0
    found, num_replays = asyncio.run(tokens_of_all(model, RecordingDevice(), eager_capture=True))
    assert num_replays > 0
    assert found == expected
