"""Schemas that are compiled beside the event loop: what is wrong with one is a 400 in the client's words."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphllm.errors import InvalidRequestError
from graphllm.llm import LLM
from graphllm.sampling_params import SamplingParams
from graphllm.structured_outputs import StructuredOutputs
from tests.e2e.serving import ServerProcess, running_server

NAMES = [f"field_{i}" for i in range(60)]
MEMBERS = {name: {"type": "integer", "minimum": 1, "maximum": 10 + i} for i, name in enumerate(NAMES)}
LONG: Any = {"type": "object", "properties": MEMBERS, "required": NAMES[:1]}
WRONG: Any = {"type": "object", "properties": {**MEMBERS, "odd": {"type": "frog"}}}
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
TOOL: Any = {"type": "function", "function": {"name": "act", "parameters": WRONG}}
FORMAT: Any = {"type": "json_schema", "name": "wrong", "schema": WRONG}

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "response_format": (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": WRONG}},
        },
        "response_format",
    ),
    "tools": (
        "/v1/chat/completions",
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required"},
        "tools",
    ),
    "guided_json of a batch": (
        "/v1/completions",
        {"prompt": ["a", "b", "c"], "guided_json": WRONG, "n": 2},
        "guided_json",
    ),
    "structured_outputs": (
        "/v1/completions",
        {"prompt": "a", "structured_outputs": {"json": WRONG}},
        "structured_outputs",
    ),
    "messages": (
        "/v1/messages",
        {
            "messages": MESSAGES,
            "max_tokens": 9,
            "output_config": {"format": {"type": "json_schema", "schema": WRONG}},
        },
        "output_config.format.schema",
    ),
    "responses": ("/v1/responses", {"input": "Hi", "text": {"format": FORMAT}}, "text.format.schema"),
}


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[ServerProcess]:
    flags = ("--model", str(tiny_model), "--served-model-name", "tiny", "--cpu-threads", "1")
    with running_server(tmp_path_factory.mktemp("tiny-server"), *flags) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "name"), CASES.values(), ids=CASES)
def test_what_is_wrong_with_a_long_schema_is_a_400_that_names_its_field(
    tiny_server: ServerProcess, path: str, body: dict[str, Any], name: str, stream: bool
) -> None:
    answer = tiny_server.request("POST", path, {"model": "tiny", "stream": stream, **body})
    assert answer.status == 400, answer.body
    error = answer.json()["error"]
    assert error["param"] == name and name in error["message"] and "frog" in error["message"]
    assert error["type"] == "invalid_request_error"
    assert ("structured_outputs" in error["message"]) is (name == "structured_outputs")
    if path == "/v1/messages":
        assert answer.json()["type"] == "error"
    tiny_server.wait_until_idle()


def test_response_in_the_background_fails_and_says_why(tiny_server: ServerProcess) -> None:
    body = {"model": "tiny", "background": True, **CASES["responses"][1]}
    response = tiny_server.request("POST", "/v1/responses", body).json()
    deadline = time.monotonic() + 30
    while response["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        response = tiny_server.get(f"/v1/responses/{response['id']}").json()
    assert response["status"] == "failed" and "text.format.schema" in response["error"]["message"]


def test_prompts_of_a_batch_share_one_long_schema(tiny_server: ServerProcess) -> None:
    body = {"model": "tiny", "prompt": ["a", "b", "c"], "guided_json": LONG, "max_tokens": 300, "seed": 3}
    answer = tiny_server.request("POST", "/v1/completions", body)
    assert answer.status == 200, answer.body
    choices = answer.json()["choices"]
    assert len(choices) == 3
    for choice in choices:
        if choice["finish_reason"] == "stop":
            assert json.loads(choice["text"])["field_0"] >= 1


def test_offline_a_long_schema_works_and_a_wrong_one_raises(tiny_model: Path) -> None:
    def params(schema: Any) -> SamplingParams:
        return SamplingParams(
            max_tokens=300, seed=2, structured_outputs=StructuredOutputs(json=json.dumps(schema))
        )

    with LLM(str(tiny_model), cpu_threads=1) as llm:
        with pytest.raises(InvalidRequestError, match="frog"):
            llm.generate(["a", "b"], params(WRONG), use_tqdm=False)
        assert llm.engine.num_unfinished_requests == 0
        for output in llm.generate(["a", "b"], params(LONG), use_tqdm=False):
            assert output.outputs[0].text.lstrip().startswith("{")
