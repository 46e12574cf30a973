"""Every way of computing that a family adds, through the kernels of a card, equals transformers.

One variant for each: what only differs in sizes is not repeated. Under the interpreter the same launches
run on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from graphllm.arena import Arena
from graphllm.attention.triton_paged import TritonPagedAttention
from graphllm.kernels.linear import linear_ref
from graphllm.models.weights import load_model
from tests.models.equality import CPU, TOLERANCE, error, prompt, theirs
from tests.models.families import FAMILIES
from tests.models.memory_checkpoint import as_checkpoint
from tests.models.moe_families import MOE_FAMILIES
from tests.models.paged_model import BLOCK_SIZE, PagedModel
from tests.models.pooled_families import CASES

pytestmark = pytest.mark.triton

VARIANTS = [
    ("Gemma 2", "caps and a window in every other layer"),
    ("Gemma 3", "stretched frequencies of full layers"),
    ("Phi", "norms of queries and keys"),
    ("Granite", "biases, tied"),
    ("OLMo 2", "norms on outputs"),
    ("SmolLM3", "windows without positions"),
    ("Cohere", "norms of queries and keys"),
    ("GLM-4", "norms on inputs and outputs"),
    ("StableLM", "in parallel, norms of queries and keys"),
    ("GPT-2", "learned positions"),
    ("OPT", "norms on sums, narrow embeddings"),
    ("Falcon", "groups, a norm each"),
    ("Falcon", "ALiBi, one key head"),
    ("Mixtral", "windows, wide heads, one expert a token"),
    ("Qwen2-MoE", "a gated shared expert"),
    ("GLM-4.5", "groups, head norms, a dense layer"),
    ("gpt-oss", "windows in every other layer"),
    ("DeepSeek-V2", "queries from the hidden state, groups, yarn"),
    ("DeepSeek-V3", "queries from a latent, yarn"),
]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_kernels_equal_transformers(name: str, variant: str) -> None:
    family = next(family for family in FAMILIES + MOE_FAMILIES if family.name == name)
    # Programs are slow here: few tokens, and so narrow windows.
    keys = {"sliding_window": 4} if "sliding_window" in family.base | family.variants[variant] else {}
    model, arena = family.tiny(variant, **keys), Arena(CPU)
    backend = TritonPagedAttention(
        block_size=BLOCK_SIZE, arena=arena, max_num_rows=2, max_model_len=64, num_multiprocessors=1
    )
    decoder = load_model(
        as_checkpoint(model), backend=backend, device=CPU, dtype=torch.float32, product=linear_ref
    )
    ours, token_ids = PagedModel(decoder, backend, arena=arena), prompt(9)
    expected = theirs(model, token_ids)
    found = [ours.step([(0, token_ids[:7])])]
    # A mixed step, in which the decode kernels take one row and the prefill kernels the other.
    found.append(ours.step([(0, token_ids[7:8]), (1, token_ids[:3])])[:1])
    found.append(ours.step([(0, token_ids[8:])], num_decode_rows=1))
    assert error(torch.cat(found), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "keys"),
    [("BERT", {}), ("EmbeddingGemma", {"sliding_window": 6, "num_hidden_layers": 6, "layer_types": None})],
)
def test_kernels_that_see_whole_prompts_equal_transformers(name: str, keys: dict[str, Any]) -> None:
    case, arena = CASES[name], Arena(CPU)
    model = replace(case, keys={**case.keys, **keys}).tiny()
    backend = TritonPagedAttention(
        block_size=BLOCK_SIZE, arena=arena, max_num_rows=2, max_model_len=64, num_multiprocessors=1
    )
    decoder = load_model(
        as_checkpoint(model), backend=backend, device=CPU, dtype=torch.float32, product=linear_ref
    )
    ours, token_ids = PagedModel(decoder, backend, arena=arena), prompt(9, seed=1)
    ours.step([(0, token_ids[:1]), (1, token_ids)])
    found = ours.hidden(10)
    for part, ids in ((found[:1], token_ids[:1]), (found[1:], token_ids)):
        assert error(part, model(torch.tensor([ids])).last_hidden_state[0].detach()) < TOLERANCE
