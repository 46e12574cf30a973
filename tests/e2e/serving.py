"""Starts the real server as a process and speaks HTTP to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

READY = re.compile(r"ready: serving .* at (http://\S+)")
LISTENING = re.compile(r"/health at (http://\S+) answers")


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The OpenAI error object; fails when there is none."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


@dataclass(slots=True)
class ServerProcess:
    """A `python -m graphllm` with its standard error in a file."""

    process: subprocess.Popen[bytes]
    log_path: Path
    url: str = ""

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for(self, pattern: re.Pattern[str], timeout: float = 180) -> re.Match[str]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            match = pattern.search(self.log)
            if match is not None:
                return match
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {pattern.pattern!r} in the server's log:\n{self.log}")

    def connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)

    def request(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str
    ) -> Answer:
        """One request on a connection of its own. Header names: `_` stands for `-`."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json", **named})
            response = connection.getresponse()
            return Answer(
                response.status,
                {name.lower(): value for name, value in response.getheaders()},
                response.read(),
            )

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, None, **headers)

    def post(self, path: str, body: bytes | dict[str, Any], **headers: str) -> Answer:
        return self.request("POST", path, body, **headers)

    def metric(self, name: str) -> float:
        """A metric without labels, such as `graphllm_kv_blocks_held`."""
        text = self.get("/metrics").body.decode()
        match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        assert match is not None, f"no {name} in:\n{text}"
        return float(match[1])

    def wait_until_idle(self, timeout: float = 10) -> None:
        """Until nothing runs, waits or holds memory; fails when that does not happen in time."""
        names = ("running_sequences", "waiting_sequences", "kv_blocks_held", "slots_held")
        deadline = time.monotonic() + timeout
        while True:
            held = {name: self.metric(f"graphllm_{name}") for name in names}
            if not any(held.values()):
                return
            assert time.monotonic() < deadline, f"still held: {held}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


def small_environment() -> dict[str, str]:
    """The environment for child processes: one thread each, because tests run side by side."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def running_server(folder: Path, *arguments: str, until: re.Pattern[str] = READY) -> Iterator[ServerProcess]:
    """`python -m graphllm` on a free port, killed at the end if it still runs."""
    log_path = folder / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "graphllm", "--port", "0", "--cpu-threads", "1", *arguments],
            stderr=log,
            env=small_environment(),
        )
    server = ServerProcess(process, log_path)
    try:
        server.url = server.wait_for(until)[1]
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
