"""The API's description has every route of the server, and every field of every body."""

from __future__ import annotations

import json
from typing import Any

import pytest

from graphllm.config import ServerConfig
from graphllm.server.app import Application
from graphllm.server.http import Headers, Request, Response
from tests.fakes import FakeEngine, RecordingChannel
from tools.update_api_fields import ENDPOINTS, Endpoint, descriptions


def get(path: str, *, api_key: str | None = None) -> tuple[int, Any]:
    channel = RecordingChannel()
    request = Request(
        method="GET",
        raw_path=path.encode(),
        query=b"",
        http_version="1.1",
        headers=Headers(),
        body=b"",
        keep_alive=True,
    )
    engine: Any = FakeEngine()
    application = Application(engine, ServerConfig(api_key=api_key), model_name="m")
    application.handle(request, Response(channel, method="GET", http_version="1.1", keep_alive=True))
    head, _, body = channel.received.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), json.loads(body)


@pytest.fixture(scope="module")
def document() -> Any:
    status, document = get("/openapi.json")
    assert status == 200
    return document


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.key)
def test_every_field_of_every_body_is_described(document: Any, endpoint: Endpoint) -> None:
    method, path = endpoint.route.split()
    content = document["paths"][path][method.lower()]["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rpartition("/")[2]
    properties = document["components"]["schemas"][name]["properties"]
    assert {field: properties[field]["description"] for field in properties} == descriptions(endpoint.struct)


def test_references_lead_somewhere(document: Any) -> None:
    schemas = document["components"]["schemas"]

    def references(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            for part in value.values():
                yield from references(part)
        elif isinstance(value, list):
            for part in value:
                yield from references(part)

    found = set(references(document))
    assert len(found) > 10
    assert found <= {f"#/components/schemas/{name}" for name in schemas}


def test_every_operation_has_an_id_of_its_own(document: Any) -> None:
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) > 15
    assert "get" in document["paths"]["/v1/models/{name}"]


def test_the_key_is_asked_for_where_the_server_has_one(document: Any) -> None:
    assert "security" not in document
    status, with_key = get("/openapi.json", api_key="secret")
    assert status == 200 and with_key["security"] == [{"key": []}]
