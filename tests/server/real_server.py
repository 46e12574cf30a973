"""A real engine of a tiny model behind the real routes, without sockets and in one thread."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from graphllm.config import EngineConfig, ServerConfig
from graphllm.engine.engine import Engine
from graphllm.runner.device import InlineDevice
from graphllm.server.app import Application
from graphllm.server.http import Headers, Request, Response
from tests.fakes import RecordingChannel


class RealServer:
    """A real engine of random weights behind the real routes, without sockets."""

    def __init__(self, model: Path, **flags: Any) -> None:
        self.loop = asyncio.new_event_loop()
        config = EngineConfig(model=str(model), **({"max_num_seqs": 8} | flags))
        self.engine = Engine(config, device=InlineDevice())
        self.loop.run_until_complete(self.engine.start())
        self.application = Application(self.engine, ServerConfig(), model_name="tiny")

    def ask(self, route: str, body: Any) -> tuple[int, bytes]:
        """Status and body of the answer. Raises whatever a handler raises that is no answer."""
        return self.loop.run_until_complete(self._ask(route, body))

    async def _ask(self, route: str, body: Any) -> tuple[int, bytes]:
        channel = RecordingChannel()
        request = Request(
            method="POST",
            raw_path=route.encode(),
            query=b"",
            http_version="1.1",
            headers=Headers(),
            body=body if isinstance(body, bytes) else json.dumps(body).encode(),
            keep_alive=True,
        )
        response = Response(channel, method="POST", http_version="1.1", keep_alive=True)
        self.application.handle(request, response)
        deadline = self.loop.time() + 20
        while not channel.is_ended:
            assert self.loop.time() < deadline, "no end"
            await asyncio.sleep(0)
        head, _, answer = channel.received.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), answer

    def post(self, route: str, **fields: Any) -> Any:
        """The answer's JSON; fails for anything but a 200."""
        status, answer = self.ask(route, {"model": "tiny", **fields})
        assert status == 200, answer
        return json.loads(answer)

    def refusal(self, route: str, **fields: Any) -> tuple[str | None, str]:
        """Parameter and message of a 400."""
        status, answer = self.ask(route, {"model": "tiny", **fields})
        assert status == 400, answer
        error = json.loads(answer)["error"]
        assert error["type"] == "invalid_request_error"
        return error["param"], error["message"]

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.stop())
        self.loop.close()
