"""transformers on a card, in the ways that people use it, on weights that are drawn and not read.

    python -m benchmarks.peers.transformers_gpu --shape llama-3.1-8b --modes single batched continuous

A peer, in a process of its own. Modes: `single` is `generate` with eager execution and one request at a
time; `batched` the same with all requests as one batch; `continuous` its own continuous batching;
`compiled` one request at a time with a static cache and torch.compile. Greedy, bfloat16, SDPA. Prints a
JSON line for each mode when it is done: tokens, seconds, and the warm-up's seconds, or an error. The
weights are those of `benchmarks/gpu/weights.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers

from benchmarks.gpu.floors import SHAPES
from benchmarks.gpu.weights import draw_weights, read_shape

MODES = ("single", "batched", "continuous", "compiled")


def build_model(config: Mapping[str, Any], device: torch.device, *, dtype: torch.dtype) -> Any:
    """A transformers model of `config` with the weights that `draw_weights` gives on that device."""
    hf_config = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            hf_config, dtype=dtype, attn_implementation="sdpa"
        )
    model.to_empty(device=device)
    # No weights, so not drawn: rotary frequencies.
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config).to(device)
    parameters = dict(model.named_parameters())
    drawn = set()
    with torch.no_grad():
        for name, tensor in draw_weights(config, device, dtype=dtype):
            parameters[name].copy_(tensor)
            drawn.add(name)
    model.tie_weights()
    left = parameters.keys() - drawn - {"lm_head.weight"}
    if left or ("lm_head.weight" not in drawn and not hf_config.tie_word_embeddings):
        raise SystemExit(f"no weights were drawn for {sorted(left) or ['lm_head.weight']}")
    return model.eval()


def prompts(vocab_size: int, *, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Random prompts of one length, so that a batch needs no padding."""
    generator = torch.Generator().manual_seed(0)
    drawn: list[list[int]] = torch.randint(
        vocab_size, (num_prompts, num_tokens), generator=generator
    ).tolist()
    return drawn


def run_mode(
    mode: str, model: Any, questions: Sequence[Sequence[int]], *, max_tokens: int, num_single: int
) -> dict[str, Any]:
    """One mode's tokens and seconds, after a warm-up that is not counted."""
    if mode == "continuous":
        ask, rounds = _continuous(model, max_tokens), [list(questions)]
    else:
        rounds = (
            [list(questions)] if mode == "batched" else [[question] for question in questions[:num_single]]
        )
        ask = _generate(model, max_tokens, is_compiled=mode == "compiled")
    start = time.perf_counter()
    ask(rounds[0])
    _wait()
    warm = time.perf_counter()
    num_tokens = sum(ask(batch) for batch in rounds)
    _wait()
    seconds = time.perf_counter() - warm
    return {"mode": mode, "num_tokens": num_tokens, "seconds": seconds, "warm_up": warm - start}


def _generate(model: Any, max_tokens: int, *, is_compiled: bool) -> Callable[[list[Sequence[int]]], int]:
    options: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": False}
    if is_compiled:
        # Static shapes are what generate compiles by itself.
        options["cache_implementation"] = "static"

    def ask(batch: list[Sequence[int]]) -> int:
        tokens = torch.tensor(batch, device=model.device)  # [batch, prompt length] int64
        with torch.inference_mode() if not is_compiled else torch.no_grad():
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        return int(output.numel() - tokens.numel())

    return ask


def _continuous(model: Any, max_tokens: int) -> Callable[[list[Sequence[int]]], int]:
    config = transformers.GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )

    def ask(batch: list[Sequence[int]]) -> int:
        outputs = model.generate_batch(
            inputs=[list(question) for question in batch], generation_config=config
        )
        num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
        if num_tokens != len(batch) * max_tokens:
            raise RuntimeError(f"{num_tokens} tokens instead of {len(batch)} times {max_tokens}")
        return num_tokens

    return ask


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="the model (llama-3.1-8b)")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="what to measure (all)"
    )
    parser.add_argument("--num-requests", type=int, default=64, help="requests of a batch (64)")
    parser.add_argument("--num-single", type=int, default=2, help="requests one at a time (2)")
    parser.add_argument("--prompt-tokens", type=int, default=80, help="tokens of each prompt (80)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of each answer (128)")
    parser.add_argument("--device", default="cuda", help="where it runs (cuda)")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    config = read_shape(options.shape)
    model = build_model(config, torch.device(options.device), dtype=torch.bfloat16)
    questions = prompts(
        config["vocab_size"], num_prompts=options.num_requests, num_tokens=options.prompt_tokens
    )
    for mode in options.modes:
        try:
            answer = run_mode(
                mode, model, questions, max_tokens=options.max_tokens, num_single=options.num_single
            )
        except Exception as error:
            answer = {"mode": mode, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
