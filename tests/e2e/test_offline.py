"""The offline API: the same tokens as the server's, in the shapes vLLM users know."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from graphllm import LLM, SamplingParams
from graphllm.errors import CheckpointError, ContextLengthError, InvalidRequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8)
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), max_num_seqs=4, kv_cache_memory_bytes=64_000_000, cpu_threads=1) as llm:
        yield llm
        assert llm.engine.num_unfinished_requests == 0


def test_it_says_what_the_server_says(client: openai.OpenAI) -> None:
    prompts = ["The capital of France is", "Once upon a time", "One, two, three,"]
    params = [
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(temperature=0.8, seed=3, max_tokens=12),
        SamplingParams(temperature=0, max_tokens=12, stop=("six",), logprobs=2),
    ]
    with LLM(dtype="float32", cpu_threads=1, kv_cache_memory_bytes=400_000_000) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        (chatted,) = llm.chat(CAPITAL, GREEDY, use_tqdm=False)
    served = [
        client.completions.create(model="demo", prompt=prompts[0], temperature=0, max_tokens=12),
        client.completions.create(model="demo", prompt=prompts[1], temperature=0.8, seed=3, max_tokens=12),
        client.completions.create(model="demo", prompt=prompts[2], temperature=0, max_tokens=12, stop="six"),
    ]
    for output, answer in zip(outputs, served, strict=True):
        assert output.outputs[0].text == answer.choices[0].text
        assert output.outputs[0].finish_reason == answer.choices[0].finish_reason
        assert answer.usage is not None
        assert len(output.outputs[0].token_ids) == answer.usage.completion_tokens
        assert len(output.prompt_token_ids) == answer.usage.prompt_tokens
    logprobs = outputs[2].outputs[0].logprobs
    assert logprobs is not None
    assert [entry.token_id for entry in logprobs] == outputs[2].outputs[0].token_ids
    assert chatted.outputs[0].token_ids == [504, 3575, 282, 4649, 314, 7042, 30, 2]
    answer = client.chat.completions.create(
        model="demo",
        messages=CAPITAL,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=8,
    )
    assert chatted.outputs[0].text == answer.choices[0].message.content


def test_a_prompt_may_be_text_a_dict_or_token_ids(llm: LLM) -> None:
    text = "Hello"
    token_ids = llm.engine.tokenizer.encode(text)
    outputs = llm.generate([text, {"prompt": text}, {"prompt_token_ids": token_ids}], GREEDY)
    assert [output.prompt for output in outputs] == [text, text, None]
    assert all(output.prompt_token_ids == token_ids and output.finished for output in outputs)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    (alone,) = llm.generate(text, GREEDY)
    assert alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_many_prompts_come_back_in_order_and_a_bar_counts_them(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [{"prompt_token_ids": [10 + index % 50, 20]} for index in range(60)]
    params = [SamplingParams(temperature=0, max_tokens=1 + index % 7, ignore_eos=True) for index in range(60)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == [p["prompt_token_ids"] for p in prompts]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1 + index % 7 for index in range(60)]
    assert "60/60" in capsys.readouterr().err
    llm.generate(prompts, params, use_tqdm=False)
    llm.generate("one", GREEDY)
    assert capsys.readouterr().err == ""


def test_n_gives_n_outputs(llm: LLM) -> None:
    (output,) = llm.generate("Hello", SamplingParams(n=3, max_tokens=8, seed=1, ignore_eos=True))
    assert [sequence.index for sequence in output.outputs] == [0, 1, 2]
    assert len({tuple(sequence.token_ids) for sequence in output.outputs}) == 3


def test_defaults_are_vllms_for_prompts(llm: LLM) -> None:
    (output,) = llm.generate("Hello")
    assert len(output.outputs[0].token_ids) <= 16
    assert output.outputs[0].logprobs is None


def test_several_conversations_are_answered_each(llm: LLM) -> None:
    one, two = llm.chat([CAPITAL, [{"role": "user", "content": "Hi"}]], GREEDY, use_tqdm=False)
    assert one.prompt is not None and one.prompt.startswith("<|im_start|>user\nWhat is the capital")
    assert one.prompt.endswith("<|im_start|>assistant\n")
    assert one.prompt_token_ids == llm.engine.tokenizer.encode_chat(CAPITAL)
    assert two.prompt_token_ids != one.prompt_token_ids
    (bare,) = llm.chat(CAPITAL, GREEDY, add_generation_prompt=False)
    assert len(bare.prompt_token_ids) < len(one.prompt_token_ids)


@pytest.mark.parametrize(
    "prompts",
    [
        5,
        [5],
        [None],
        {"text": "x"},
        [{"prompt": 5}],
        {"prompt_token_ids": ["a"]},
        {"prompt_token_ids": []},
        "",
        [""],
    ],
)
def test_a_wrong_prompt_raises_and_nothing_goes_on_running(llm: LLM, prompts: Any) -> None:
    with pytest.raises((InvalidRequestError, TypeError)):
        llm.generate(prompts, GREEDY)
    assert llm.engine.num_unfinished_requests == 0
    assert llm.generate("Hello", GREEDY)[0].finished


def test_one_bad_prompt_of_many_is_named_and_the_rest_are_let_go(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": [5]}] * 3 + [{"prompt_token_ids": [5] * 9000}]
    with pytest.raises(ContextLengthError) as caught:
        llm.generate(prompts, SamplingParams(max_tokens=50), use_tqdm=False)
    assert "prompt 3 of 4" in caught.value.__notes__[0]
    assert llm.engine.num_unfinished_requests == 0
    assert llm.generate("Hello", GREEDY)[0].finished


def test_parameters_must_fit_the_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="2 prompts and 1"):
        llm.generate(["a", "b"], [GREEDY])


def test_it_works_inside_a_running_loop(llm: LLM) -> None:
    async def notebook_cell() -> tuple[list[int], str]:
        other = asyncio.create_task(asyncio.sleep(0, "went on"))
        tokens = llm.generate("Hello", GREEDY)[0].outputs[0].token_ids
        assert asyncio.get_running_loop() is loop
        return tokens, await other

    async def main() -> tuple[list[int], str]:
        nonlocal loop
        loop = asyncio.get_running_loop()
        return await notebook_cell()

    loop: asyncio.AbstractEventLoop
    tokens, other = asyncio.run(main())
    assert tokens == llm.generate("Hello", GREEDY)[0].outputs[0].token_ids
    assert other == "went on"


def test_a_running_loop_still_hears_its_signals_afterwards(llm: LLM) -> None:
    async def main() -> None:
        heard = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.set)
        llm.generate("Hello", GREEDY)
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.wait_for(heard.wait(), timeout=10)

    asyncio.run(main())


def test_a_prompts_logprobs_come_with_its_output(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3)
    scored, plain = llm.generate(["Hello there", "Hello there"], [params, GREEDY], use_tqdm=False)
    assert plain.prompt_logprobs is None
    assert scored.prompt_logprobs is not None
    first, *others = scored.prompt_logprobs
    assert first is None
    assert [entry.token_id for entry in others if entry is not None] == scored.prompt_token_ids[1:]
    assert all(entry is not None and len(entry.top) == 3 and entry.rank for entry in others)
    assert scored.outputs[0].token_ids == plain.outputs[0].token_ids[:2]


def test_a_prompt_may_be_scored_without_an_answer(llm: LLM) -> None:
    (output,) = llm.generate("Hello there", SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert output.finished and output.outputs[0].text == "" and output.outputs[0].token_ids == []
    assert output.outputs[0].finish_reason == "length"
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len("Hello there")


def test_embeddings_are_in_the_prompts_order_and_of_length_1(llm: LLM) -> None:
    prompts = ["Hello", {"prompt_token_ids": list(range(40))}, "Hello", {"prompt": "Goodbye"}]
    outputs = llm.embed(prompts, use_tqdm=False)
    vectors = [output.outputs.embedding for output in outputs]
    assert [output.prompt for output in outputs] == ["Hello", None, "Hello", "Goodbye"]
    assert outputs[1].prompt_token_ids == list(range(40)) and all(output.finished for output in outputs)
    assert len({len(vector) for vector in vectors}) == 1
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-6) and vectors[0] != pytest.approx(vectors[3])
    for vector in vectors:
        assert math.hypot(*vector) == pytest.approx(1.0, rel=1e-5)
    (raw,) = llm.embed("Hello", normalize=False)
    length = math.hypot(*raw.outputs.embedding)
    assert abs(length - 1.0) > 0.1
    assert [value / length for value in raw.outputs.embedding] == pytest.approx(vectors[0], abs=1e-6)


def test_a_prompt_that_cannot_be_embedded_embeds_nothing(llm: LLM) -> None:
    with pytest.raises(ContextLengthError):
        llm.embed(["Hello", {"prompt_token_ids": [1] * 9000}], use_tqdm=False)
    assert llm.engine.num_unfinished_requests == 0


def test_it_works_off_the_main_thread(llm: LLM) -> None:
    with ThreadPoolExecutor(1) as executor:
        (output,) = executor.submit(llm.generate, "Hello", GREEDY).result()
    assert output.outputs == llm.generate("Hello", GREEDY)[0].outputs


def test_ctrl_c_aborts_and_leaves_the_llm_usable(llm: LLM) -> None:
    earlier = signal.getsignal(signal.SIGINT)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a"] * 20, SamplingParams(max_tokens=8000, ignore_eos=True), use_tqdm=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert signal.getsignal(signal.SIGINT) is earlier
    assert llm.engine.num_unfinished_requests == 0
    assert llm.generate("Hello", GREEDY)[0].finished


def test_a_closed_llm_says_so(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), kv_cache_memory_bytes=64_000_000, cpu_threads=1)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("Hello")


def test_a_missing_model_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing-here"):
        LLM(str(tmp_path / "nothing-here"))
