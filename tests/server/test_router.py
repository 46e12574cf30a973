"""Which requests reach which handler, and what the others are told. Over a real server."""

from __future__ import annotations

import pytest

from graphllm.server.http import Handler, Request, Response
from graphllm.server.router import Router
from tests.server.http_client import Answer, Client, run, serving


def named(name: str) -> Handler:
    def handler(request: Request, response: Response) -> None:
        params = ",".join(f"{key}={value}" for key, value in request.path_params.items())
        response.send(200, f"{name} {params}".encode(), content_type="text/plain; charset=utf-8")

    return handler


def make_router() -> Router:
    router = Router()
    router.add("GET", "/v1/models", named("list"))
    router.add("GET", "/v1/models/{model_id:path}", named("model"))
    router.add("DELETE", "/v1/models/{model_id:path}", named("delete"))
    router.add("GET", "/v1/models/special", named("special"))
    router.add("GET", "/v1/models/sub/{rest:path}", named("sub"))
    router.add("POST", "/v1/chat/completions", named("chat"))
    router.add("GET", "/v1/things/{id}", named("thing"))
    router.add("GET", "/v1/things/{id}/parts", named("parts"))
    router.add("POST", "/v1/things/{id}/cancel", named("cancel"))
    return router


def ask(method: str, target: bytes) -> Answer:
    answers: list[Answer] = []

    async def test() -> None:
        async with serving(make_router()) as server, Client.connect(server) as client:
            request = method.encode() + b" " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n"
            answers.append(await client.ask(request, head=method == "HEAD"))

    run(test())
    return answers[0]


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("GET", b"/v1/models", "list "),
        ("GET", b"/v1/models?limit=3", "list "),
        ("GET", b"/v1/models/llama", "model model_id=llama"),
        ("GET", b"/v1/models/meta/llama?x=/y", "model model_id=meta/llama"),
        ("GET", b"/v1/models/meta%2Fllama", "model model_id=meta/llama"),
        ("GET", b"/v1/models/meta%2fllama%20a", "model model_id=meta/llama a"),
        ("GET", b"/v1/models/a+b", "model model_id=a+b"),
        ("GET", b"/v1/models/a%252Fb", "model model_id=a%2Fb"),
        ("GET", b"/v1/models/%E6%97%A5", "model model_id=日"),
        ("GET", b"/v1/models//", "model model_id=/"),
        ("GET", b"/v1/models/special", "special "),
        ("GET", b"/v1/models/special/", "model model_id=special/"),
        ("GET", b"/v1/models/sub/a/b", "sub rest=a/b"),
        ("DELETE", b"/v1/models/special/x", "delete model_id=special/x"),
        ("POST", b"/v1/chat/completions", "chat "),
        ("GET", b"/v1/things/a", "thing id=a"),
        ("GET", b"/v1/things/a%2Fb", "thing id=a/b"),
        ("GET", b"/v1/things/a/parts", "parts id=a"),
        ("GET", b"/v1/things/parts", "thing id=parts"),
        ("POST", b"/v1/things/a%20b/cancel", "cancel id=a b"),
    ],
)
def test_request_reaches_its_handler(method: str, target: bytes, body: str) -> None:
    answer = ask(method, target)
    assert (answer.status, answer.body.decode()) == (200, body)


@pytest.mark.parametrize(
    "target",
    [
        b"/",
        b"/v1",
        b"/v1/models/",
        b"/v1/modelsx",
        b"/V1/models",
        b"/v1/%6dodels",
        b"//v1/models",
        b"/v1%2Fmodels",
        b"/v1/things/",
        b"/v1/things/a/",
        b"/v1/things/a/b/parts",
        b"/v1/things//parts",
    ],
)
def test_unknown_path_is_a_404_that_names_it(target: bytes) -> None:
    answer = ask("GET", target)
    assert answer.status == 404
    assert target.decode() in answer.error["message"]


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        ("POST", b"/v1/models", "GET, HEAD"),
        ("OPTIONS", b"/v1/models", "GET, HEAD"),
        ("GET", b"/v1/chat/completions", "POST"),
        ("HEAD", b"/v1/chat/completions", "POST"),
        ("PUT", b"/v1/models/x", "DELETE, GET, HEAD"),
        ("GET", b"/v1/things/a/cancel", "POST"),
    ],
)
def test_other_method_is_a_405_that_says_which_are_allowed(method: str, target: bytes, allow: str) -> None:
    answer = ask(method, target)
    assert (answer.status, answer.headers["allow"]) == (405, allow)
    if method != "HEAD":
        assert answer.error["code"] == "method_not_allowed"


def test_head_is_answered_by_the_get_route() -> None:
    answer = ask("HEAD", b"/v1/models")
    assert (answer.status, answer.headers["content-length"]) == (200, str(len("list ")))


@pytest.mark.parametrize("target", [b"/v1/models/%", b"/v1/models/a%2", b"/v1/models/%zz", b"/v1/models/%FF"])
def test_parameter_that_is_not_percent_encoded_utf8_is_a_400(target: bytes) -> None:
    answer = ask("GET", target)
    assert (answer.status, answer.error["param"]) == (400, "model_id")


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "v1",
        "/a/{b:path}/c",
        "/a/{b}c",
        "/a/{b}/{c}",
        "/{a:path}{b:path}",
        "/v1/models",
        "/v1/models/{other:path}",
    ],
)
def test_malformed_or_repeated_route_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"path|handler|parameter"):
        make_router().add("GET", pattern, named("x"))
