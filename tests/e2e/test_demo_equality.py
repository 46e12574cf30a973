"""Greedy tokens of the demo model are those of transformers, in float32, prompt by prompt.

transformers is asked once for each prompt, with our tokens behind it: if every token of ours is the
best of its logits at every position, its own greedy decoding would have taken the same tokens. A
position where its two best logits are closer than 1e-3 ends a prompt's comparison, since there the
order of summation may decide.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graphllm import LLM, SamplingParams
from graphllm.models.checkpoint import open_checkpoint
from graphllm.models.demo import demo_model_path

NEAR_TIE = 1e-3
NUM_TOKENS = 48
MIN_PROMPTS = 20
MIN_TOKENS = 24

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\n",
    "SELECT name, age FROM users WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are:\n1.",
    "Q: What is the largest planet in the solar system?\nA:",
    "Ingredients:\n- 2 cups of flour\n- 1 cup of sugar\n",
    "It was the best of times, it was the worst of times,",
    '{"name": "Alice", "age": 30, "city":',
    "<html>\n<head>\n<title>",
    "1, 1, 2, 3, 5, 8, 13,",
    "La capitale de l'Italie est",
    "Die Hauptstadt von Deutschland ist",
    "東京は",
    "\U0001f600 \U0001f680 \U0001f600",
    "To be, or not to be, that is the question:",
    "In 1969, Neil Armstrong",
    "Water boils at a temperature of",
    "The mitochondria is the powerhouse of",
    "x^2 + 2x + 1 =",
    "int main(int argc, char **argv) {\n",
    "Monday, Tuesday, Wednesday,",
    "a",
    "Breaking news: scientists have discovered",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "<|im_start|>user\nCount from 1 to 10.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """transformers' Llama with the demo's weights."""
    checkpoint = open_checkpoint(demo_model_path())
    config = LlamaConfig(**checkpoint.hf_config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.tensor_names()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, strict=True, assign=True)
    # Not a weight: computed at construction, which was on no device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()


def num_equal_tokens(reference: LlamaForCausalLM, prompt: list[int], output: list[int]) -> int:
    """How many output tokens were compared and found equal before a near-tie; fails on another token."""
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :].float()
    for position, token_id in enumerate(output):
        (best, second), (best_id, _) = logits[position].topk(2)
        if best - second < NEAR_TIE:
            return position
        assert token_id == best_id, f"token {position} of {output}: transformers says {best_id}"
    return len(output)


def test_greedy_tokens_are_those_of_transformers(reference: LlamaForCausalLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(dtype="float32", kv_cache_memory_bytes=400_000_000) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert len({tuple(output.prompt_token_ids) for output in outputs}) == len(PROMPTS) > MIN_PROMPTS
    counts = [
        num_equal_tokens(reference, output.prompt_token_ids, output.outputs[0].token_ids)
        for output in outputs
    ]
    assert sum(count >= MIN_TOKENS for count in counts) >= MIN_PROMPTS, counts


def test_the_reference_is_the_golden_model(reference: LlamaForCausalLM) -> None:
    """transformers, filled from our reading of the file, decodes the known answer by itself."""
    tokenizer = open_checkpoint(demo_model_path()).load_tokenizer()
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    with torch.inference_mode():
        generated = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=8,
            pad_token_id=2,
        )
    assert generated[0, len(prompt) :].tolist() == [504, 3575, 282, 4649, 314, 7042, 30, 2]
