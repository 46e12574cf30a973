"""transformers' `generate` as a peer: the same weights and prompts, one request at a time.

A helper process for `benchmarks/serving.py --peer transformers`: float32, eager attention, greedy, with
its own KV cache. The weights are the checkpoint's own, handed over tensor by tensor, so a GGUF file and a
folder are compared alike. Reads {"messages", "max_tokens"} a line, answers with times in seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
import transformers

from graphllm.models.checkpoint import open_checkpoint, resolve_model_path

if TYPE_CHECKING:
    from graphllm.models.checkpoint import Checkpoint


class TokenTimes:
    """A transformers streamer that only looks at the clock; its first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Part of a streamer; nothing to do."""


def load_model(checkpoint: Checkpoint) -> Any:
    """The checkpoint as a transformers model, float32, eager attention, on the CPU."""
    config = transformers.AutoConfig.for_model(**checkpoint.hf_config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    model.to_empty(device="cpu")
    # Not in the checkpoint, so not filled from it: rotary frequencies.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    weights = {name: checkpoint.tensor(name).to(torch.float32) for name in checkpoint.tensor_names()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    left = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if left or unexpected:
        raise SystemExit(f"transformers' model lacks {sorted(left)} and does not know {sorted(unexpected)}")
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description="transformers' generate, asked in JSON lines.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    checkpoint = open_checkpoint(resolve_model_path(arguments.model))
    tokenizer = checkpoint.load_tokenizer()
    model = load_model(checkpoint)
    print(json.dumps({"transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        prompt = torch.tensor([tokenizer.encode_chat(question["messages"])])  # [1, prompt length] int64
        watch = TokenTimes()
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=question["max_tokens"],
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=watch,
            )
        end = time.perf_counter()
        answer = {
            "start": start,
            "token_times": watch.times[1:],
            "end": end,
            "num_prompt_tokens": prompt.shape[1],
            "text": tokenizer.decode(output[0, prompt.shape[1] :].tolist()),
        }
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
