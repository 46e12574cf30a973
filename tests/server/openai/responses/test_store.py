"""The response store stays within its bounds, and conversations outlive their first turns."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from graphllm.errors import NotFoundError
from graphllm.server.openai.responses.store import (
    MAX_REMEMBERED_IDS,
    OVERHEAD_BYTES,
    ResponseStore,
    StoredResponse,
    StoreFullError,
    StoreLimits,
    Turn,
    body_with_output,
)

KILOBYTE = b'["' + b"x" * 1020 + b'"]'


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Run:
    """A background run, as far as the store looks at it."""

    is_running: bool = True
    num_log_bytes: int = 0


def new_store(clock: Clock | None = None, **limits: float) -> ResponseStore:
    return ResponseStore(StoreLimits(**limits), now=clock or Clock())  # type: ignore[arg-type]


def put(
    store: ResponseStore, response_id: str, *, previous: Turn | None = None, run: Run | None = None
) -> StoredResponse:
    turn = Turn(previous, input_items=KILOBYTE, output_items=KILOBYTE)
    stored = StoredResponse(response_id, turn, head=b'{"id":"' + response_id.encode() + b'"}', background=run)
    store.add(stored)
    return stored


def reason(store: ResponseStore, response_id: str) -> str:
    with pytest.raises(NotFoundError) as caught:
        store.get(response_id, param="previous_response_id")
    assert caught.value.param == "previous_response_id" and repr(response_id) in caught.value.message
    return caught.value.message


def test_body_is_head_and_output() -> None:
    assert body_with_output(b'{"id":"a"}', b"[1]") == b'{"id":"a","output":[1]}'


def test_oldest_response_makes_room_for_a_new_one() -> None:
    store = new_store(max_responses=3)
    for number in range(5):
        put(store, f"resp_{number}")
    assert len(store) == 3
    assert store.get("resp_2").response_id == "resp_2"
    assert "--max-stored-responses" in reason(store, "resp_1")


def test_bytes_are_bounded_and_counted_exactly() -> None:
    store = new_store(max_bytes=10 * 1024)
    for number in range(50):
        put(store, f"resp_{number}")
        assert store.num_bytes <= 10 * 1024
    assert len(store) == 3  # of about 3 kB each, with their overhead
    for number in (47, 48, 49):
        store.delete(f"resp_{number}")
    assert store.num_bytes == 0 and len(store) == 0


def test_response_larger_than_the_bound_is_not_kept_and_breaks_nothing() -> None:
    store = new_store(max_bytes=1024)
    put(store, "resp_large")
    assert len(store) == 0 and store.num_bytes == 0
    assert "make room" in reason(store, "resp_large")


def test_expired_response_says_that_it_has_expired() -> None:
    clock = Clock()
    store = new_store(clock, max_age=60.0)
    put(store, "resp_1")
    clock.now = 59.0
    put(store, "resp_2")
    assert store.get("resp_1")
    clock.now = 61.0
    assert "has expired (--response-ttl)" in reason(store, "resp_1")
    assert store.get("resp_2")


def test_deleted_and_unknown_responses_say_so() -> None:
    store = new_store()
    put(store, "resp_1")
    store.delete("resp_1")
    assert "was deleted" in reason(store, "resp_1")
    assert "is not stored here" in reason(store, "resp_other")
    with pytest.raises(NotFoundError):
        store.delete("resp_1")


def test_reasons_are_remembered_within_a_bound() -> None:
    store = new_store(max_responses=1)
    for number in range(MAX_REMEMBERED_IDS + 3):
        put(store, f"resp_{number}")
    assert "make room" in reason(store, f"resp_{MAX_REMEMBERED_IDS}")
    assert "removed long ago" in reason(store, "resp_0")


def test_conversation_can_be_continued_when_its_first_responses_are_gone() -> None:
    store = new_store(max_responses=2)
    first = put(store, "resp_1")
    second = put(store, "resp_2", previous=first.turn)
    third = put(store, "resp_3", previous=second.turn)
    assert "make room" in reason(store, "resp_1")
    assert list(store.get("resp_3").turn.history()) == [first.turn, second.turn, third.turn]
    # Its turns count as long as they are needed, each once.
    turn_bytes = OVERHEAD_BYTES + 2 * len(KILOBYTE)
    entry_bytes = OVERHEAD_BYTES + len(third.head)
    assert store.num_bytes == 3 * turn_bytes + 2 * entry_bytes
    store.delete("resp_3")
    assert store.num_bytes == 2 * turn_bytes + entry_bytes
    store.delete("resp_2")
    assert store.num_bytes == 0


def test_two_continuations_share_what_is_before_them() -> None:
    store = new_store()
    first = put(store, "resp_1")
    put(store, "resp_2", previous=first.turn)
    put(store, "resp_3", previous=first.turn)
    before = store.num_bytes
    store.delete("resp_1")
    assert before - store.num_bytes == OVERHEAD_BYTES + len(first.head)
    store.delete("resp_2")
    assert len(list(store.get("resp_3").turn.history())) == 2
    store.delete("resp_3")
    assert store.num_bytes == 0


def test_conversation_whose_response_was_evicted_meanwhile_counts_again() -> None:
    store = new_store()
    first = put(store, "resp_1")
    turn = Turn(first.turn, input_items=KILOBYTE)
    store.delete("resp_1")  # while its continuation is being generated
    assert store.num_bytes == 0
    store.add(StoredResponse("resp_2", turn, head=b"{}"))
    assert store.num_bytes == first.turn.num_bytes + turn.num_bytes + OVERHEAD_BYTES + 2


def test_running_responses_stay_and_the_oldest_finished_one_goes() -> None:
    store = new_store(max_responses=2)
    put(store, "resp_running", run=Run())
    put(store, "resp_done")
    put(store, "resp_new")
    assert store.get("resp_running") and store.get("resp_new")
    assert "make room" in reason(store, "resp_done")


def test_running_response_does_not_expire_and_lets_those_behind_it_expire() -> None:
    clock = Clock()
    store = new_store(clock, max_age=60.0)
    run = Run()
    put(store, "resp_running", run=run)
    put(store, "resp_done")
    clock.now = 61.0
    assert store.get("resp_running")
    assert "has expired" in reason(store, "resp_done")
    run.is_running = False
    assert "has expired" in reason(store, "resp_running")


def test_store_full_of_running_responses_takes_no_further_one() -> None:
    store = new_store(max_responses=2)
    runs = [Run(), Run()]
    for number, run in enumerate(runs):
        store.check_room()
        put(store, f"resp_{number}", run=run)
    with pytest.raises(StoreFullError) as caught:
        store.check_room()
    assert (caught.value.status, caught.value.param) == (429, "background")
    runs[0].is_running = False
    store.check_room()


def test_growing_log_counts_and_evicts_others() -> None:
    store = new_store(max_bytes=10 * 1024)
    run = Run()
    put(store, "resp_old")
    running = put(store, "resp_running", run=run)
    before = store.num_bytes
    run.num_log_bytes = 1000
    store.changed(running)
    assert store.num_bytes == before + 1000
    run.num_log_bytes = 9000
    store.changed(running)
    assert "make room" in reason(store, "resp_old")
    assert store.get("resp_running")
    run.is_running = False
    store.changed(running)  # alone it is still above the bound
    assert len(store) == 0 and store.num_bytes == 0


def test_change_of_a_deleted_response_counts_nothing() -> None:
    store = new_store()
    running = put(store, "resp_1", run=Run())
    store.delete("resp_1")
    running.turn.output_items = KILOBYTE * 3
    store.changed(running)
    assert store.num_bytes == 0
