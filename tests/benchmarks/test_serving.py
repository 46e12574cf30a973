"""The load generator as a whole, against a small server that speaks the same protocol."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.sse_client import Endpoint
from benchmarks.workload import Workload, run_round

STEP_SECONDS = 0.004


class TokenServer:
    """Streams "word " every few milliseconds, as often as the request asks for, on a thread of its own."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.num_running = self.max_running = 0
        self.refuse = False
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].split()[0])
                await self._answer(json.loads(await reader.readexactly(length)), writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.requests.append(request)
        if self.refuse:
            writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy")
            return
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(request["max_tokens"]):
            await asyncio.sleep(STEP_SECONDS)
            self._event(writer, {"choices": [{"index": 0, "delta": {"content": "word "}}]})
        usage = {"prompt_tokens": 5, "completion_tokens": request["max_tokens"]}
        self._event(writer, {"choices": [], "usage": usage})
        self.num_running -= 1
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


@pytest.fixture
def server() -> Iterator[TokenServer]:
    server = TokenServer()
    yield server
    server.close()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    code = serving.main(arguments)
    return code, capsys.readouterr().out.splitlines()


def test_a_run_ends_with_one_json_line_that_holds_what_the_table_says(
    server: TokenServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "results" / "serving.jsonl"
    arguments = ["--url", server.url, "--model", "m", "--num-requests", "8", "--max-tokens", "10"]
    arguments += ["--rounds", "2", "--concurrency", "1,8", "--output", str(output)]
    code, lines = run(capsys, *arguments)
    assert code == 0
    result = json.loads(lines[-1])
    assert json.loads(output.read_text()) == result
    assert [r["concurrency"] for r in result["results"]] == [1, 8]
    for r in result["results"]:
        assert (r["num_requests"], r["num_tokens"], r["num_errors"]) == (16, 160, 0)
        assert len(r["round_tokens_per_second"]) == 2
        assert r["itl_ms"]["p50"] > 1000 * STEP_SECONDS * 0.9
        assert r["mean_context_len"] == 10
    assert result["ratios"]["8 streams / 1 stream"] > 2
    assert server.url not in lines[-1]
    (row,) = [line for line in lines if line.split()[:2] == ["server", "8"]]
    assert row.split()[3] == f"{result['results'][1]['tokens_per_second']:.1f}"


def test_every_prompt_is_asked_once_and_asks_for_a_whole_answer(
    server: TokenServer, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--url", server.url, "--num-requests", "4", "--max-tokens", "2", "--concurrency", "1,2"]
    assert run(capsys, *arguments, "--rounds", "2")[0] == 0
    measured = [
        request for request in server.requests if request["messages"] != server.requests[0]["messages"]
    ]
    assert len(measured) == 16
    assert len({request["messages"][0]["content"] for request in measured}) == 16
    for request in measured:
        assert request["stream"] is True
        assert request["stream_options"] == {"include_usage": True}
        assert (request["temperature"], request["max_tokens"], request["ignore_eos"]) == (0, 2, True)


def test_so_many_streams_run_at_once_and_no_more(server: TokenServer) -> None:
    workload = Workload("m", max_tokens=5)
    bodies = [workload.body(index) for index in range(12)]
    result = asyncio.run(run_round(Endpoint.parse(server.url, "/"), bodies, concurrency=3))
    assert len(result.completions) == 12
    assert server.max_running == 3
    first, last = result.completions[0], max(result.completions, key=lambda c: c.end)
    assert result.seconds >= last.end - first.start


def test_refused_requests_are_reported_and_fail_the_run(
    server: TokenServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refuse = True
    arguments = ["--url", server.url, "--num-requests", "2", "--rounds", "1", "--concurrency", "1"]
    code, lines = run(capsys, *arguments)
    assert code == 1
    assert json.loads(lines[-1])["num_errors"] == 2
    assert "error: HTTP 429: busy" in lines


def test_a_server_that_does_not_answer_in_time_is_an_error(server: TokenServer) -> None:
    body = Workload("m", max_tokens=500).body(0)
    start = time.perf_counter()
    result = asyncio.run(run_round(Endpoint.parse(server.url, "/"), [body], concurrency=1, timeout=0.05))
    assert result.errors == ("no answer within 0.05 s",)
    assert time.perf_counter() - start < 1.5


def test_no_server_is_an_error_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "--url", "http://127.0.0.1:9", "--num-requests", "1", "--rounds", "1")
    assert code == 1
    assert json.loads(lines[-1])["num_errors"] == 2


def test_prompts_are_varied_but_the_same_every_time() -> None:
    workload = Workload("m", seed=3)
    assert workload.body(4) == Workload("m", seed=3).body(4)
    assert workload.body(4) != workload.body(5)
    assert workload.body(4) != Workload("m", seed=4).body(4)


def test_prompt_words_lengthen_the_prompt_by_half_to_once_and_a_half() -> None:
    def num_words(prompt_words: int, index: int) -> int:
        return len(Workload("m", prompt_words=prompt_words).messages(index)[0]["content"].split())

    for index in range(20):
        assert 45 < num_words(100, index) - num_words(0, index) < 160


def test_a_peer_s_answers_become_a_round() -> None:
    class Peer:
        def ask(self, question: dict[str, Any]) -> dict[str, Any]:
            assert question["max_tokens"] == 3
            times = {"start": 1.0, "token_times": [1.5, 1.7, 1.9], "end": 2.0}
            return {**times, "num_prompt_tokens": 4, "text": "abc"}

    result = serving.peer_round(Peer(), Workload("m", max_tokens=3), range(2))  # type: ignore[arg-type]
    assert result.num_tokens == 6
    assert result.seconds == 2.0
