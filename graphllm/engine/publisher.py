"""From applied tokens to the requests' sinks: detokenizing, stop strings, one write a connection.

Owns the queue of tokens that were applied and not yet published, and each request's detokenizers.
It publishes in slices, so that launching the next step never waits for more than one of them.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from graphllm.engine.metrics import EngineMetrics
from graphllm.engine.sink import Sink
from graphllm.outputs import FinishReason, SequenceDelta, TokenLogprob
from graphllm.scheduler.scheduler import AppliedToken, Scheduler
from graphllm.sequence import Sequence, SequenceGroup
from graphllm.tokenizer.detokenizer import IncrementalDetokenizer, StopStrings
from graphllm.tokenizer.tokenizer import Tokenizer

SLICE_SECONDS = 0.001


class Request:
    """A request that has not ended: its group, its sink, a detokenizer for each sequence.

    Raises InvalidRequestError for stop strings that are too long.
    """

    __slots__ = ("detokenizers", "group", "num_unpublished", "prompt_logprobs", "sink")

    def __init__(self, group: SequenceGroup, sink: Sink, *, tokenizer: Tokenizer) -> None:
        self.group = group
        self.sink = sink
        params = group.params
        stop = StopStrings(params.stop)
        self.detokenizers: list[IncrementalDetokenizer | None] = [
            IncrementalDetokenizer(
                tokenizer,
                group.prompt_token_ids,
                stop=stop,
                skip_special_tokens=params.skip_special_tokens,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                shown_special_token_ids=params.shown_special_token_ids,
            )
            for _ in group.sequences
        ]
        self.num_unpublished = len(group.sequences)
        self.prompt_logprobs = group.prompt_logprobs  # until the first sequence's first delta takes it


@dataclass(frozen=True, slots=True)
class _Entry:
    """One applied token, or the end of what generates none; `finish_reason` as it stood then.

    is_text: whether the token is part of the sequence's text; one that stops it is not.
    """

    request: Request
    sequence: Sequence
    token_id: int
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    is_text: bool
    pooled: array[float] | None


class Publisher:
    """Publishes applied tokens in order.

    `on_end` is told of each request whose last token went out, and says whether anyone still wants its
    end. `on_broken` is told of each whose publishing raised: one request's trouble must not end the
    loop that serves the others.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        metrics: EngineMetrics,
        *,
        on_end: Callable[[Request], bool],
        on_broken: Callable[[Request, Exception], None],
    ) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._on_end = on_end
        self._on_broken = on_broken
        self._queue: deque[_Entry] = deque()

    @property
    def backlog(self) -> int:
        """Tokens that were applied and not yet published."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        return not self._queue

    def enqueue(self, request: Request, applied: AppliedToken, *, completes: bool = False) -> None:
        """`completes`: the token stops its sequence by making its text complete, and is part of it."""
        sequence = applied.sequence
        self._queue.append(
            _Entry(
                request,
                sequence,
                applied.token_id,
                applied.logprob,
                sequence.finish_reason,
                sequence.stop_reason,
                completes or sequence.finish_reason is not FinishReason.STOP,
                applied.pooled,
            )
        )

    def publish_slice(self, seconds: float = SLICE_SECONDS) -> None:
        """Publish for at most about `seconds`, then flush each sink that was written to."""
        deadline = time.perf_counter() + seconds
        dirty: dict[int, Request] = {}
        ended: list[Request] = []
        while self._queue:
            entry = self._queue.popleft()
            request = entry.request
            try:
                if self._publish(entry):
                    dirty[id(request)] = request
                    if request.num_unpublished == 0:
                        ended.append(request)
            except Exception as error:
                dirty.pop(id(request), None)
                self._on_broken(request, error)
            if time.perf_counter() > deadline:
                break
        for request in dirty.values():
            self._guarded(request, request.sink.flush)
        for request in ended:
            # A flush may have cut its client, and with it every request behind the same answer.
            if self._on_end(request):
                self._guarded(request, request.sink.finish)

    def _guarded(self, request: Request, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._on_broken(request, error)

    def drop(self, request: Request) -> None:
        """Forget what is queued of a request that was aborted or has failed."""
        request.detokenizers = [None] * len(request.detokenizers)
        self._queue = deque(entry for entry in self._queue if entry.request is not request)

    def _publish(self, entry: _Entry) -> bool:
        """Detokenize one token and write it; False when its sequence had been published to its end."""
        sequence = entry.sequence
        detokenizer = entry.request.detokenizers[sequence.index]
        if detokenizer is None:
            return False
        generates = sequence.group.generates
        if generates:
            self._observe_latency(sequence)
        reason, stop_reason = entry.finish_reason, entry.stop_reason
        text, matched = "", None
        includes_stop = stop_reason is not None and sequence.params.include_stop_str_in_output
        if generates and (entry.is_text or includes_stop):
            text, matched = detokenizer.append((entry.token_id,))
        if matched is not None:
            reason, stop_reason = FinishReason.STOP, matched
            self._scheduler.finish(sequence, FinishReason.STOP, stop_reason=matched)
        elif reason is not None:
            text += detokenizer.finish()
        if reason is not None:
            entry.request.detokenizers[sequence.index] = None
            entry.request.num_unpublished -= 1
            self._metrics.sequences_finished.labels(reason.value).inc()
        logprobs = None if entry.logprob is None else (entry.logprob,)
        prompt_logprobs = None
        if sequence.index == 0:
            prompt_logprobs, entry.request.prompt_logprobs = entry.request.prompt_logprobs, None
        entry.request.sink.write(
            SequenceDelta(
                sequence.index,
                text,
                (entry.token_id,) if generates else (),
                logprobs,
                reason,
                stop_reason,
                entry.request.group.sequences[0].num_cached_tokens,
                prompt_logprobs,
                entry.pooled,
            )
        )
        return True

    def _observe_latency(self, sequence: Sequence) -> None:
        now = time.perf_counter()
        if sequence.last_token_time is None:
            sequence.first_token_time = now
            self._metrics.time_to_first_token.observe(now - sequence.group.arrival_time)
        else:
            self._metrics.inter_token.observe(now - sequence.last_token_time)
        sequence.last_token_time = now
