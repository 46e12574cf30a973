"""The CPU dressed as an asynchronous device: order, events, errors, the loop's notification."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch

from graphllm.errors import ConfigError
from graphllm.runner.device import CpuDevice, InlineDevice, open_device


def test_submit_returns_before_the_work_is_done() -> None:
    device = CpuDevice(1)
    gate = threading.Event()
    event = device.submit(lambda: gate.wait(10) and None)
    assert not event.query()
    gate.set()
    device.close()
    assert event.query()


def test_work_runs_in_order_on_one_other_thread() -> None:
    device = CpuDevice(1)
    seen: list[tuple[int, int]] = []
    for index in range(100):
        device.submit(lambda index=index: seen.append((index, threading.get_ident())))
    device.close()
    assert [index for index, _ in seen] == list(range(100))
    assert len({thread for _, thread in seen} | {threading.get_ident()}) == 2


def test_failed_work_keeps_its_error_and_later_work_runs() -> None:
    device = CpuDevice(1)
    failed = device.submit(lambda: 1 // 0 and None)
    later = device.submit(lambda: None)
    device.close()
    assert isinstance(failed.error, ZeroDivisionError)
    assert later.query()
    assert later.error is None


def test_loop_is_told_of_progress() -> None:
    async def scenario() -> float:
        device = CpuDevice(1)
        progressed = asyncio.Event()
        device.watch(asyncio.get_running_loop(), progressed.set)
        started = time.perf_counter()
        event = device.submit(lambda: time.sleep(0.05))
        while not event.query():
            progressed.clear()
            await asyncio.wait_for(progressed.wait(), 10)
        device.close()
        return time.perf_counter() - started

    assert asyncio.run(scenario()) >= 0.05


def test_run_returns_the_result_and_raises_the_error() -> None:
    async def scenario() -> None:
        device = CpuDevice(1)
        assert await device.run(lambda: 41 + 1) == 42
        with pytest.raises(ZeroDivisionError):
            await device.run(lambda: 1 // 0)
        device.close()

    asyncio.run(scenario())


def test_work_runs_without_autograd() -> None:
    device = CpuDevice(1)
    seen: list[bool] = []
    device.submit(lambda: seen.append(torch.is_inference_mode_enabled()))
    device.close()
    InlineDevice().submit(lambda: seen.append(torch.is_inference_mode_enabled()))
    assert seen == [True, True]


def test_threads_inside_an_operation_are_those_asked_for() -> None:
    device = CpuDevice(1)
    seen: list[int] = []
    device.submit(lambda: seen.append(torch.get_num_threads()))
    device.close()
    assert seen == [1]


def test_inline_work_is_done_at_once() -> None:
    event = InlineDevice().submit(lambda: 1 // 0 and None)
    assert event.query()
    assert isinstance(event.error, ZeroDivisionError)


def test_cuda_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="--device cuda"):
        open_device("cuda")


@pytest.mark.parametrize("behind_steps", [False, True])
def test_copies_on_a_cpu_keep_the_order_of_what_was_submitted(*, behind_steps: bool) -> None:
    device = CpuDevice(1)
    gate = threading.Event()
    seen: list[str] = []
    device.submit(lambda: gate.wait(10) and seen.append("step"))
    copy = device.submit_copy(lambda: seen.append("copy"), behind_steps=behind_steps)
    device.submit(lambda: seen.append("next step"))
    assert not copy.query()
    gate.set()
    device.close()
    assert seen == ["step", "copy", "next step"]
    assert copy.query() and copy.times.end >= copy.times.start > 0
