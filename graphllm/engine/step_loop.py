"""The step loop: schedule, launch, apply, publish, as one task on the server's event loop.

Owns the order of these and the requests that have not ended, and what happens when a step fails. Rows that
the host constrains are masked by `held_rows.py`, when this file says so.

Two steps are known at a time: one running and one to follow. When step N ends its tokens are
applied and published, and shortly before the predicted end of N+1 the step N+2 is scheduled and
launched, so that the device never waits and an arrival waits for as little as possible. Copies of KV blocks
to and from host memory run beside the steps; no step waits for one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from graphllm.engine.adapter_uploads import AdapterUploads
from graphllm.engine.garbage import GarbageKeeper
from graphllm.engine.held_rows import HeldRows
from graphllm.engine.loading import LoadedModel
from graphllm.engine.memory_metrics import MemoryCollector
from graphllm.engine.metrics import EngineMetrics
from graphllm.engine.publisher import Publisher, Request
from graphllm.engine.sink import Sink
from graphllm.engine.step_timer import StepTimer
from graphllm.engine.transfers import Transfers
from graphllm.errors import GraphLLMError, StepFailedError
from graphllm.outputs import FinishReason
from graphllm.runner.device import Device
from graphllm.runner.model_runner import StepHandle
from graphllm.scheduler.scheduler import AppliedToken
from graphllm.sequence import Sequence, SequenceGroup

logger = logging.getLogger(__name__)

_MAX_CONSECUTIVE_FAILURES = 3
_SHORT_STEP = 0.004  # seconds; below this, waiting to schedule costs more than it gives
_TRANSFER_POLLING = 0.001  # seconds between two looks at copies whose device tells nobody of their end
_STEPS_BETWEEN_FULL_CHECKS = 256
_POLLING_MARGIN = 0.0015  # seconds before a step's end; timers have whole milliseconds
_NEVER = float("inf")


class StepLoop:
    """Runs `model` for the requests that were added. `on_failed(reason)` means it runs no more."""

    def __init__(
        self,
        model: LoadedModel,
        device: Device,
        *,
        metrics: EngineMetrics,
        garbage: GarbageKeeper,
        look_ahead: bool,
        debug_kv: bool = False,
        on_failed: Callable[[str], None],
    ) -> None:
        self.model = model
        self._device = device
        self._metrics = metrics
        self._garbage = garbage
        self._depth = 2 if look_ahead else 1
        self._on_failed = on_failed
        self._debug_kv = debug_kv
        self._num_checks = 0
        self._scheduler = model.scheduler
        uploads = AdapterUploads(model.scheduler, model.adapter_memory, device=device)
        self._transfers = Transfers(model.scheduler, model.swapper, rates=model.rates, uploads=uploads)
        self._graphs = model.runner.graphs
        self._publisher = Publisher(
            model.scheduler, metrics, on_end=self._request_ended, on_broken=self._request_broken
        )
        self._held = HeldRows(
            model.scheduler, metrics, vocab_size=model.vocab_size, on_broken=self._constraint_broken
        )
        self._max_backlog = 2 * model.scheduler.limits.max_num_seqs
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[StepHandle] = deque()
        self._timer = StepTimer()
        self._sleeper: asyncio.Future[None] | None = None
        self._launch_at = 0.0
        self._expected_end = 0.0
        self._num_consecutive_failures = 0
        self._num_preemptions_seen = 0
        self._num_misses_seen = 0
        self._stopping = False
        metrics.include(MemoryCollector(model.scheduler, model.swapper))
        metrics.model_info.labels(quantization=model.quantization or "none").set(1)
        metrics.blocks_total.set(model.scheduler.block_manager.num_usable_blocks)

    @property
    def num_requests(self) -> int:
        """Requests whose last token has not been published."""
        return len(self._requests)

    # -- requests ---------------------------------------------------------------------------------

    def add(self, group: SequenceGroup, sink: Sink) -> None:
        """Queue a request that was checked. It may join the next step that is scheduled."""
        assert group.request_id not in self._requests, "request ids are unique"
        self._requests[group.request_id] = Request(group, sink, tokenizer=self.model.tokenizer)
        self._scheduler.add(group)
        self._update_gauges()
        if self._launch_at == _NEVER:
            self._launch_at = 0.0
        self._wake()

    def abort(self, request_id: str) -> None:
        """End a request without telling its sink. Unknown and ended requests are no error."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self._end(request, FinishReason.ABORT.value)
        self._wake()

    def fail_all(self, error: GraphLLMError) -> None:
        """End every request with `error`."""
        for request_id in tuple(self._requests):
            try:
                self._fail(request_id, error)
            except Exception:
                logger.exception("request %s could not be taken out", request_id)

    def stop(self) -> None:
        """Let `run` return when the steps in flight have ended."""
        self._stopping = True
        self._wake()

    # -- the loop ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Launching outranks applying, and each turn publishes at most a slice."""
        self._device.watch(asyncio.get_running_loop(), self._wake)
        try:
            while self._in_flight or self._transfers.has_pending or not self._stopping:
                self._poll_transfers()
                if self._launch_is_due():
                    self._launch()
                step_ended = len(self._in_flight) > 0 and self._in_flight[0].ready()
                if step_ended:
                    self._apply(self._in_flight.popleft())
                if self._held.are_due:
                    self._sample_held_slice()
                if step_ended:
                    self._garbage.after_step()
                if self._launch_is_due():
                    self._launch()
                if self._held.are_due:  # the device waits for their masks
                    await asyncio.sleep(0)
                elif not self._publisher.is_idle:
                    self._publish_slice()
                    await asyncio.sleep(0)
                elif self._in_flight and self._in_flight[0].ready():
                    await asyncio.sleep(0)
                elif self._graphs.has_captures_due and not self._stopping:
                    self._capture_slice()
                    await asyncio.sleep(0)
                elif self._in_flight or self._transfers.has_pending or not self._stopping:
                    await self._sleep()
        except Exception as error:
            logger.exception("the step loop failed")
            self._on_failed(f"{type(error).__name__}: {error}")

    def _may_launch(self) -> bool:
        """Whether a further step could be scheduled, now or a little later."""
        return (
            len(self._in_flight) < self._depth
            and not self._held.are_pending  # their sampler needs the logits that a launch overwrites
            and self._scheduler.has_unfinished
            and self._publisher.backlog <= self._max_backlog
            and not self._stopping
        )

    def _launch_is_due(self) -> bool:
        """Whether to schedule now, rather than nearer to the end of the step that runs."""
        return self._may_launch() and time.perf_counter() >= self._launch_at

    def _launch(self) -> None:
        """Schedule and launch one step, if any sequence can run."""
        started = time.perf_counter()
        batch = self._scheduler.schedule()
        self._transfers.launch_due()
        if batch is None:
            self._launch_at = _NEVER  # until a step or a copy completes or a request arrives
            return
        handle = self.model.runner.launch(batch)
        if self._debug_kv:
            self._check_memory()
        now = time.perf_counter()
        self._timer.observe_host(now - started)
        self._metrics.host_seconds.inc(now - started)
        self._in_flight.append(handle)
        self._held.launched(handle)
        # Steps without graphs may keep the host so busy that it is never idle: each pays for a slice, or
        # they would stay without for ever.
        self._capture_slice()
        if len(self._in_flight) == 1:
            self._plan_next_launch(started_at=now)

    def _capture_slice(self) -> None:
        if self._graphs.has_captures_due:
            self._graphs.capture_slice()
            self._update_graph_metrics()

    def _plan_next_launch(self, *, started_at: float) -> None:
        """Set when the step after the running one, begun at about `started_at`, is due."""
        predicted = self._timer.predict(self._in_flight[0].batch)
        self._expected_end = started_at + (predicted or 0.0)
        if predicted is None or predicted < _SHORT_STEP:
            self._launch_at = started_at
        else:
            self._launch_at = started_at + predicted - self._timer.lead(predicted)

    def _poll_transfers(self) -> bool:
        """Whether copies have ended: blocks are free, or a sequence's KV is back, and someone may run."""
        if not self._transfers.poll():
            return False
        if self._launch_at == _NEVER:
            self._launch_at = 0.0
        if self._debug_kv:
            self._check_memory()
        self._update_gauges()
        return True

    def _check_memory(self) -> None:
        """Raises AssertionError, which ends the loop."""
        self._num_checks += 1
        self._scheduler.check(full=self._num_checks % _STEPS_BETWEEN_FULL_CHECKS == 0)

    def _apply(self, handle: StepHandle) -> None:
        """Confirm a completed step's tokens, or fail its requests and no others."""
        started = time.perf_counter()
        self._scheduler.step_completed(handle.batch.step_id)
        self._launch_at = 0.0
        if self._in_flight:  # the step behind the completed one is running now
            # Not when the loop noticed: a loop that was busy must not make the next step late too.
            self._plan_next_launch(started_at=handle.times.end or time.perf_counter())
        try:
            result = handle.result()
        except StepFailedError as error:
            self._step_failed(handle, error)
            return
        applied = self._scheduler.apply(handle.batch, result)
        if self._debug_kv:
            self._check_memory()
        if any(not row.sequence.is_finished for row in handle.batch.rows) or applied:
            self._num_consecutive_failures = 0
        seconds = handle.times.end - handle.times.start
        self._timer.observe_step(handle.batch, seconds)
        self.model.rates.observe_step(handle.batch, seconds)
        self._metrics.steps.inc()
        self._metrics.step_seconds.observe(seconds)
        self._metrics.generated_tokens.inc(sum(token.sequence.group.generates for token in applied))
        for token in applied:
            self._take(token)
        self._metrics.host_seconds.inc(time.perf_counter() - started)

    def _take(self, token: AppliedToken) -> None:
        """Tell a token's constraint, if it has one, and queue it to be published."""
        request = self._requests.get(token.sequence.group.request_id)
        if request is None:  # another token of this step was its end
            return
        completes = False
        if token.sequence.constraint is not None:
            try:
                completes = self._held.accept(token.sequence, token.token_id)
            except Exception as error:
                self._constraint_broken(token.sequence, error)
                return
        self._publisher.enqueue(request, token, completes=completes)

    def _sample_held_slice(self) -> None:
        started = time.perf_counter()
        self._held.sample_slice()
        self._metrics.host_seconds.inc(time.perf_counter() - started)

    def _constraint_broken(self, sequence: Sequence, error: Exception) -> None:
        """A constraint leaves no token, or is defective: the end of its request and of no other."""
        request_id = sequence.group.request_id
        if not isinstance(error, GraphLLMError):
            logger.error("the constraint of request %s failed", request_id, exc_info=error)
            error = GraphLLMError(f"Internal error: {error}")
        self._fail(request_id, error)

    def _publish_slice(self) -> None:
        started = time.perf_counter()
        self._publisher.publish_slice()
        self._update_gauges()
        self._metrics.host_seconds.inc(time.perf_counter() - started)

    def _step_failed(self, handle: StepHandle, error: StepFailedError) -> None:
        """Fail the step's requests. Their rows in the step already launched become no-ops."""
        logger.error("step %d failed", handle.batch.step_id, exc_info=error)
        self._metrics.failed_steps.inc()
        self._scheduler.step_failed(handle.batch)
        request_ids = {row.sequence.group.request_id for row in handle.batch.rows}
        request_ids &= self._requests.keys()
        if not request_ids:  # launched before the failure of the step ahead of it was known
            return
        for request_id in request_ids:
            self._fail(request_id, error)
        self._num_consecutive_failures += 1
        if self._num_consecutive_failures >= _MAX_CONSECUTIVE_FAILURES:
            self._stopping = True
            self._on_failed(f"{self._num_consecutive_failures} steps failed in a row, the last: {error}")

    def _fail(self, request_id: str, error: GraphLLMError) -> None:
        # One answer may stand behind several requests: its failure aborts the others.
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        try:
            self._end(request, "error")
        finally:
            try:
                request.sink.fail(error)
            except Exception:
                logger.exception("request %s could not be told of its failure", request_id)

    def _end(self, request: Request, reason: str) -> None:
        """Take a request that was forgotten out of scheduler and publisher."""
        num_cut = sum(detokenizer is not None for detokenizer in request.detokenizers)
        self._metrics.sequences_finished.labels(reason).inc(num_cut)
        self._publisher.drop(request)
        self._scheduler.abort(request.group)
        request.group.forget()
        self._update_gauges()

    def _request_ended(self, request: Request) -> bool:
        """False when it was aborted or has failed meanwhile."""
        if self._requests.pop(request.group.request_id, None) is None:
            return False
        request.group.forget()
        self._metrics.request_seconds.observe(time.perf_counter() - request.group.arrival_time)
        return True

    def _request_broken(self, request: Request, error: Exception) -> None:
        """A token of this request could not be published: a defect of ours, and this request's end."""
        logger.error("publishing to request %s failed", request.group.request_id, exc_info=error)
        self._fail(request.group.request_id, GraphLLMError(f"Internal error: {error}"))

    # -- waiting ----------------------------------------------------------------------------------

    async def _sleep(self) -> None:
        """Until the device progresses, a request arrives or ends, or a launch is due.

        A device that tells nobody of its progress is asked again and again, but only near the time at which
        the running step should end: before that there is nothing to see.
        """
        if self._poll_transfers():  # of a device that was done with them at once
            return
        loop = asyncio.get_running_loop()
        deadline = _NEVER
        if not self._in_flight:
            self._garbage.when_idle()
        else:
            if self._may_launch():
                deadline = self._launch_at
            if self._device.must_poll:
                deadline = min(deadline, self._expected_end - _POLLING_MARGIN)
                if time.perf_counter() >= deadline:
                    await asyncio.sleep(0)
                    return
        if self._device.must_poll and self._transfers.has_pending:
            deadline = min(deadline, time.perf_counter() + _TRANSFER_POLLING)
        self._sleeper = loop.create_future()
        timer = None
        if deadline != _NEVER:
            timer = loop.call_later(max(0.0, deadline - time.perf_counter()), self._wake)
        try:
            await self._sleeper
        finally:
            self._sleeper = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    def _update_gauges(self) -> None:
        scheduler, metrics = self._scheduler, self._metrics
        metrics.running.set(len(scheduler.running))
        metrics.waiting.set(len(scheduler.waiting))
        metrics.blocks_held.set(scheduler.block_manager.num_held_blocks)
        metrics.slots_held.set(scheduler.slots.num_held)
        metrics.preemptions.inc(scheduler.num_preemptions - self._num_preemptions_seen)
        self._num_preemptions_seen = scheduler.num_preemptions
        self._update_graph_metrics()

    def _update_graph_metrics(self) -> None:
        graphs, metrics = self._graphs, self._metrics
        metrics.graph_misses.inc(graphs.num_misses - self._num_misses_seen)
        self._num_misses_seen = graphs.num_misses
        metrics.graphs_captured.set(graphs.num_captured)
        metrics.graphs_wanted.set(graphs.num_wanted)
        metrics.graph_bytes.set(graphs.num_bytes)
        metrics.capture_allocations.set(graphs.num_capture_allocations)
