"""The processes that a benchmark starts: the server under test, and a helper that answers in JSON lines.

Owns starting, waiting until they are of use, and ending them. Knows nothing of what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sse_client import Endpoint, LoadError
from benchmarks.workload import get_json

REPOSITORY = Path(__file__).resolve().parents[1]


class ProcessError(Exception):
    """A process that did not start or ended early; the message has the end of what it said."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def graphllm_server(arguments: Sequence[str], *, ready_timeout: float) -> Iterator[tuple[str, float]]:
    """Run `python -m graphllm` on a free port; gives its address and the seconds until it was ready.

    Raises ProcessError with the end of its log when it does not get there. Ended with an interrupt, as
    by Ctrl-C.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "graphllm", *arguments, "--port", str(port)]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        # Sessions of their own: a Ctrl-C is for the benchmark, which then ends them in order.
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            while not _is_ready(url):
                if process.poll() is not None or time.perf_counter() - start > ready_timeout:
                    raise ProcessError(f"the server did not become ready:\n{_tail(log)}")
                time.sleep(0.02)
            yield url, time.perf_counter() - start
        finally:
            _end(process)


class JsonLineProcess:
    """A helper process: one JSON line in, one JSON line out, idle in between.

    The first line it prints says that it is ready. Its standard error is the benchmark's own.
    """

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self.ready = self._receive()
        except BaseException:
            self.close()
            raise

    def ask(self, question: Any) -> Any:
        """Send a question and wait for its answer. Raises ProcessError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ProcessError("the helper process has ended") from None
        return self._receive()

    def close(self) -> None:
        """End it: by the end of its input, and by an interrupt where that does not help."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            # What was not flushed to a process that has ended is lost.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        _end(self._process)

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ProcessError(f"the helper process ended with code {self._process.wait()}")
        return json.loads(line)


def _is_ready(url: str) -> bool:
    async def ask() -> None:
        async with asyncio.timeout(5):
            await get_json(Endpoint.parse(url, "/ready"))

    try:
        asyncio.run(ask())
    except ValueError:
        return True  # 200 with a body that is not JSON
    except (OSError, LoadError, TimeoutError):
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: Any) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-20:])
