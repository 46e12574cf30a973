"""The offline API: the same engine as the server's, driven from the calling thread.

    with LLM("demo") as llm:
        print(llm.generate("The capital of France is")[0].outputs[0].text)

Owns the calls that vLLM users know and the event loop that the engine runs on while one of them waits.
Nothing runs between calls. A call's way through the engine is `offline.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import uvloop
from tqdm import tqdm

from graphllm.config import EngineConfig
from graphllm.engine.engine import Engine
from graphllm.errors import GraphLLMError, InvalidRequestError
from graphllm.models.pair_scores import PairScores
from graphllm.models.pooled_texts import TextEncoder, activated, find_prompt
from graphllm.offline import GenerateJob, OfflineJob, Output, Pooled, PoolJob, Prompt
from graphllm.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    l2_normalized,
)
from graphllm.sampling_params import SamplingParams

tqdm.monitor_interval = 0  # its monitor is a thread

T = TypeVar("T")
Conversation = Sequence[Mapping[str, Any]]
Lora = str | Sequence[str | None] | None

# What vLLM and /v1/completions generate for a prompt whose parameters are not given.
DEFAULT_MAX_TOKENS = 16


class LLM:
    """A model in this process, for many prompts at once.

    model: as `--model`: a folder, a .gguf file or "demo". The rest are the fields of `EngineConfig`.
    Raises StartupError when the model cannot be loaded.

    Calls come from one thread at a time. They also work where an event loop is running already (a
    notebook): that loop stands still until the call returns.
    """

    def __init__(self, model: str = "demo", **engine_config: Any) -> None:
        self._engine = Engine(EngineConfig(model=model, **engine_config))
        self._loop: asyncio.AbstractEventLoop | None = uvloop.new_event_loop()
        self._num_calls = 0
        try:
            self._run(self._engine.start(show_progress=True))
        except (GraphLLMError, OSError):
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """The engine, for its tokenizer, metrics and limits."""
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: Lora = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt; results are in the prompts' order.

        A prompt is a text, `{"prompt": text}` or `{"prompt_token_ids": [...]}`. `sampling_params` is
        one for all or one for each; by default 16 tokens at temperature 1. `lora` names an adapter, one
        for all or one for each, None for the base model; see `load_lora_adapter`. A progress bar shows for
        more than one prompt. Ctrl-C aborts what is running and leaves the LLM usable.

        Raises InvalidRequestError for a prompt or parameters that cannot work; nothing is returned
        then, and nothing goes on running.
        """
        entries = _as_prompts(prompts)
        params = _params_for_each(
            sampling_params, len(entries), default=SamplingParams(max_tokens=DEFAULT_MAX_TOKENS)
        )
        return self._generate(entries, params, lora, use_tqdm=use_tqdm, add_special_tokens=True)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: Lora = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The assistant's next message of one conversation, or of each of several.

        A conversation is a list of `{"role": ..., "content": ...}`. Without `sampling_params` an
        answer runs to its end or the context's, at temperature 1. `lora` as in `generate`.

        Raises InvalidRequestError, also when the model has no chat template.
        """
        self._engine.check_generates()
        conversations = _as_conversations(messages)
        tokenizer = self._engine.tokenizer
        if tokenizer.chat_template is None:
            raise InvalidRequestError("This model has no chat template; use generate().", param="messages")
        entries: list[Prompt] = [
            tokenizer.render_chat(
                [dict(message) for message in conversation],
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        params = _params_for_each(sampling_params, len(entries), default=SamplingParams())
        # The template has written the special tokens itself.
        return self._generate(entries, params, lora, use_tqdm=use_tqdm, add_special_tokens=False)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        lora: Lora = None,
        normalize: bool | None = None,
        prompt_name: str | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, in `outputs.embedding`, made as it was published with the model.

        A model that generates gives the hidden state of the last token behind its last norm. normalize:
        divide vectors by their length; by default as published. prompt_name: which of the model's published
        prompts goes in front of each text. Prompts and `lora` are as in `generate`, and prompts may fill the
        whole context.

        Raises InvalidRequestError for a prompt that cannot work, or a model that is for scores; nothing is
        returned then.
        """
        pooling = self._engine.pooling
        if pooling.purpose == "score":
            raise InvalidRequestError("This model is for scores; use score() or classify().", param="model")
        normalizes = pooling.normalizes if normalize is None else normalize
        return [
            EmbeddingRequestOutput(
                pooled.request_id,
                pooled.prompt,
                pooled.prompt_token_ids,
                EmbeddingOutput((l2_normalized(pooled.result) if normalizes else pooled.result).tolist()),
            )
            for pooled in self._pool(
                _as_prompts(prompts),
                lora,
                prefix=find_prompt(pooling, prompt_name, None),
                use_tqdm=use_tqdm,
            )
        ]

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        lora: str | None = None,
        instruction: str | None = None,
        use_activation: bool = True,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """How well each document answers its query, in `outputs.score`; one query may be for all.

        A model for scores reads both as one text; of a model for vectors it is their similarity.
        lora: an adapter for all. instruction: what to judge by, for models that can be told. use_activation:
        False gives logits.

        Raises InvalidRequestError, also for a model that gives no scores.
        """
        firsts, seconds = ([texts] if isinstance(texts, str) else [*texts] for texts in (queries, documents))
        firsts = firsts * len(seconds) if len(firsts) == 1 else firsts
        if len(firsts) != len(seconds):
            raise InvalidRequestError(
                f"There are {len(firsts)} queries and {len(seconds)} documents; give one query for all, or "
                "one for each.",
                param="queries",
            )
        engine = self._engine
        pairs = PairScores(
            engine.tokenizer,
            engine.pooling,
            [*zip(firsts, seconds, strict=True)],
            max_tokens=engine.max_model_len,
            instruction=instruction,
            is_raw=not use_activation,
            params=("queries", "documents"),
        )
        inputs: list[Prompt] = [{"prompt_token_ids": token_ids} for token_ids in pairs.inputs()]
        results = self._pool(inputs, lora, prefix="", use_tqdm=use_tqdm)
        return [
            ScoringRequestOutput(f"{self._name}-{index}", ScoringOutput(score))
            for index, score in enumerate(pairs.scores([pooled.result for pooled in results]))
        ]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        lora: Lora = None,
        use_activation: bool = True,
        use_tqdm: bool = True,
    ) -> list[ClassificationRequestOutput]:
        """How likely each of the model's labels is for each prompt, in `outputs.probs`.

        Prompts and `lora` are as in `generate`. use_activation: False gives logits, which of a reward model
        are the rewards.

        Raises InvalidRequestError, also for a model that has no labels.
        """
        pooling = self._engine.pooling
        if not pooling.labels:
            raise InvalidRequestError("This model has no labels.", param="model")
        outputs = []
        for pooled in self._pool(_as_prompts(prompts), lora, prefix="", use_tqdm=use_tqdm):
            probs = activated(pooled.result, pooling, is_raw=not use_activation)
            label = pooling.labels[max(range(len(probs)), key=probs.__getitem__)]
            outputs.append(
                ClassificationRequestOutput(
                    pooled.request_id,
                    pooled.prompt,
                    pooled.prompt_token_ids,
                    ClassificationOutput(probs, label),
                )
            )
        return outputs

    def load_lora_adapter(self, name: str, path: str, *, load_inplace: bool = False) -> None:
        """Load an adapter's folder, which calls may then name; needs `enable_lora`.

        load_inplace: it takes the place of the adapter of that name. Raises InvalidRequestError for a name
        that cannot be, CheckpointError for a folder that cannot be served.
        """
        self._run(self._engine.adapters.load(name, path, replaces=load_inplace))

    def unload_lora_adapter(self, name: str) -> None:
        """Take an adapter's name and memory away. Raises ModelNotFoundError."""
        self._engine.adapters.unload(name)

    def close(self) -> None:
        """Release the model and its memory. Closing again does nothing."""
        if self._loop is None:
            return
        self._run(self._engine.stop())
        self._loop.close()
        self._loop = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _generate(
        self,
        prompts: list[Prompt],
        params: list[SamplingParams],
        lora: Lora,
        *,
        use_tqdm: bool,
        add_special_tokens: bool,
    ) -> list[RequestOutput]:
        with self._progress(len(prompts), use_tqdm=use_tqdm) as bar:
            job = GenerateJob(
                self._engine,
                self._next_name(),
                prompts=prompts,
                params=params,
                loras=_lora_for_each(lora, len(prompts)),
                add_special_tokens=add_special_tokens,
                bar=bar,
            )
            return self._finish(job)

    def _pool(self, prompts: list[Prompt], lora: Lora, *, prefix: str, use_tqdm: bool) -> list[Pooled]:
        """Each prompt's result; prefix: goes in front of its text."""
        encoder = TextEncoder(
            tokenizer=self._engine.tokenizer,
            pooling=self._engine.pooling,
            max_tokens=self._engine.max_model_len,
            prompt=prefix,
            param="prompts",
        )
        with self._progress(len(prompts), use_tqdm=use_tqdm) as bar:
            job = PoolJob(
                self._engine,
                self._next_name(),
                prompts=prompts,
                loras=_lora_for_each(lora, len(prompts)),
                encoder=encoder,
                bar=bar,
            )
            return self._finish(job)

    def _next_name(self) -> str:
        self._num_calls += 1
        return self._name

    @property
    def _name(self) -> str:
        return f"offline-{self._num_calls}"

    def _progress(self, num_prompts: int, *, use_tqdm: bool) -> Any:
        is_hidden = not use_tqdm or num_prompts < 2
        return tqdm(total=num_prompts, desc="Prompts", unit="prompt", disable=is_hidden)

    def _finish(self, job: OfflineJob[Output]) -> list[Output]:
        """The job's outputs. Raises KeyboardInterrupt when Ctrl-C came first."""
        outputs = self._run(job.run())
        if outputs is None:
            raise KeyboardInterrupt
        return outputs

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise RuntimeError("This LLM is closed.")
        with _outer_loop_set_aside():
            return self._loop.run_until_complete(work)


@contextlib.contextmanager
def _outer_loop_set_aside() -> Iterator[None]:
    """Let a loop be run inside a callback of another one, which stands still meanwhile."""
    outer = asyncio._get_running_loop()
    if outer is None:
        yield
        return
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(outer)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Raises InvalidRequestError for anything that is no prompt."""
    entries = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    for position, entry in enumerate(entries):
        is_prompt = isinstance(entry, str) or (
            isinstance(entry, Mapping)
            and (isinstance(entry.get("prompt"), str) or "prompt_token_ids" in entry)
        )
        if not is_prompt:
            raise InvalidRequestError(
                f'Prompt {position} must be a text, {{"prompt": text}} or {{"prompt_token_ids": [...]}}, '
                f"not {type(entry).__name__}.",
                param="prompts",
            )
    return entries


def _as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    if not messages:
        raise InvalidRequestError("messages must not be empty.", param="messages")
    if isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]  # one conversation: its entries are messages
    return list(messages)  # type: ignore[arg-type]  # several: its entries are lists of messages


def _params_for_each(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int, *, default: SamplingParams
) -> list[SamplingParams]:
    if sampling_params is None:
        return [default] * count
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * count
    if len(sampling_params) != count:
        raise InvalidRequestError(
            f"There are {count} prompts and {len(sampling_params)} sampling parameters; "
            "give one for all, or one for each.",
            param="sampling_params",
        )
    return list(sampling_params)


def _lora_for_each(lora: Lora, count: int) -> list[str | None]:
    if lora is None or isinstance(lora, str):
        return [lora] * count
    if len(lora) != count:
        raise InvalidRequestError(
            f"There are {count} prompts and {len(lora)} adapters; give one for all, or one for each.",
            param="lora",
        )
    return list(lora)
