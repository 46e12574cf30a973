"""Random weights behind the public face: no checkpoint, no tokenizer file, and text comes out."""

from __future__ import annotations

import json
from pathlib import Path

from graphllm import LLM, SamplingParams

SHAPE = Path(__file__).parents[2] / "benchmarks" / "shapes" / "qwen3-0.6b.json"
SMALLER = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 2000}


def test_a_configuration_alone_generates_and_chats(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(json.loads(SHAPE.read_text()) | SMALLER))
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=5)
    with LLM(str(path), load_format="dummy", max_model_len=256) as llm:
        first, second = (result.outputs[0] for result in llm.generate([" abc"] * 2, params))
        reply = llm.chat([{"role": "user", "content": "Hello"}], params)[0].outputs[0]
    assert first.token_ids == second.token_ids
    assert len(first.token_ids) == len(reply.token_ids) == 12
    # A random model chooses among all tokens, nearly all of which are a space and letters.
    assert len(set(first.token_ids)) > 6
    assert len(first.text) > 24
