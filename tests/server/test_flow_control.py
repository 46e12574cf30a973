"""The two ways of being slow, over a buffer that tests fill and drain."""

from __future__ import annotations

from graphllm.server.flow_control import FlowControl


class Buffer:
    def __init__(self) -> None:
        self.size = 0

    def get_write_buffer_size(self) -> int:
        return self.size


def make(max_unread_bytes: int = 100) -> tuple[FlowControl, Buffer]:
    buffer = Buffer()
    return FlowControl(buffer, max_unread_bytes=max_unread_bytes, now=0.0), buffer


def write(flow: FlowControl, buffer: Buffer, num_bytes: int) -> None:
    flow.record_write(num_bytes)
    buffer.size += num_bytes


def test_client_is_overrun_only_above_the_limit() -> None:
    flow, buffer = make(max_unread_bytes=100)
    write(flow, buffer, 100)
    assert flow.unread_bytes == 100 and not flow.is_overrun
    write(flow, buffer, 1)
    assert flow.is_overrun
    buffer.size = 0
    assert not flow.is_overrun


def test_client_with_nothing_unread_never_stalls() -> None:
    flow, _ = make()
    assert not any(flow.is_stalled(now, 5.0) for now in (0.0, 10.0, 1000.0))


def test_client_that_takes_nothing_stalls_after_the_timeout() -> None:
    flow, buffer = make()
    assert not flow.is_stalled(100.0, 5.0)
    write(flow, buffer, 10)
    assert not flow.is_stalled(104.9, 5.0)
    assert flow.is_stalled(105.0, 5.0)


def test_client_that_reads_while_its_buffer_grows_makes_progress() -> None:
    flow, buffer = make()
    for now in range(100):
        write(flow, buffer, 10)
        buffer.size -= 1
        assert not flow.is_stalled(float(now), 5.0)
    assert buffer.size == 900


def test_client_that_stops_reading_stalls_although_it_read_before() -> None:
    flow, buffer = make()
    write(flow, buffer, 100)
    buffer.size = 50
    assert not flow.is_stalled(10.0, 5.0)
    write(flow, buffer, 100)
    assert not flow.is_stalled(14.0, 5.0)
    assert flow.is_stalled(15.0, 5.0)
