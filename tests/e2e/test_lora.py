"""Adapters over HTTP: clients choose them by their names as models, operators load and unload them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from graphllm import LLM, SamplingParams
from graphllm.errors import InvalidRequestError, ModelNotFoundError
from tests.e2e.serving import ServerProcess, running_server
from tests.tiny_adapters import write_tiny_adapter

KEY = "secret"
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: str(write_tiny_adapter(root / name, seed=seed)) for seed, name in enumerate(("a", "b"))}


@pytest.fixture(scope="module")
def lora_server(
    tiny_model: Path, folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    flags = [
        "--model",
        str(tiny_model),
        "--served-model-name",
        "base",
        "--api-key",
        KEY,
        "--max-num-seqs",
        "8",
    ]
    flags += ["--kv-cache-memory-bytes", "64MB", "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2"]
    flags += ["--lora-modules", f"a={folders['a']}"]
    with running_server(tmp_path_factory.mktemp("lora-server"), *flags) as server:
        yield server


@pytest.fixture
def client(lora_server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{lora_server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client
    lora_server.wait_until_idle()


def post(server: ServerProcess, route: str, body: dict[str, Any], key: str = KEY) -> Any:
    return server.post(f"/v1/{route}", body, Authorization=f"Bearer {key}")


def test_every_endpoint_takes_an_adapters_name_as_the_model(
    client: openai.OpenAI, lora_server: ServerProcess
) -> None:
    chat: Any = [{"role": "user", "content": PROMPT}]
    claude = anthropic.Anthropic(base_url=lora_server.url, api_key=KEY, max_retries=0, timeout=60)
    texts: dict[str, list[Any]] = {}
    for model in ("base", "a"):
        completed = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=12)
        chatted = client.chat.completions.create(model=model, messages=chat, temperature=0, max_tokens=12)
        stream = client.chat.completions.create(
            model=model, messages=chat, temperature=0, max_tokens=12, stream=True
        )
        chunks = list(stream)
        response = client.responses.create(model=model, input=PROMPT, temperature=0, max_output_tokens=12)
        message = claude.messages.create(
            model=model, messages=chat, max_tokens=12, extra_body={"temperature": 0}
        )
        embedded = client.embeddings.create(model=model, input=PROMPT)
        answers = (completed, chatted, chunks[0], response, message, embedded)
        assert {answer.model for answer in answers} == {model}
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == chatted.choices[0].message.content
        texts[model] = [
            completed.choices[0].text,
            streamed,
            response.output_text,
            [block.to_dict() for block in message.content],
            embedded.data[0].embedding,
        ]
    assert all(one != other for one, other in zip(texts["base"], texts["a"], strict=True))


def test_adapters_are_listed_with_their_parent(client: openai.OpenAI, folders: dict[str, str]) -> None:
    models = {model.id: model.to_dict() for model in client.models.list()}
    assert list(models) == ["base", "a"]
    assert (models["a"]["parent"], models["a"]["root"]) == ("base", folders["a"])
    assert "parent" not in models["base"]
    assert client.models.retrieve("a").to_dict() == models["a"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("b")


def test_an_operator_loads_and_unloads_adapters(
    client: openai.OpenAI, lora_server: ServerProcess, folders: dict[str, str]
) -> None:
    def text(model: str) -> str:
        return (
            client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=12)
            .choices[0]
            .text
        )

    before = text("a")
    with pytest.raises(openai.NotFoundError, match="'b' does not exist"):
        text("b")
    loaded = post(lora_server, "load_lora_adapter", {"lora_name": "b", "lora_path": folders["b"]})
    assert (loaded.status, loaded.json()["rank"]) == (200, 4)
    after = text("b")
    assert len({before, after, text("base")}) == 3
    full = post(lora_server, "load_lora_adapter", {"lora_name": "c", "lora_path": folders["b"]})
    assert (full.status, full.error["param"]) == (400, "lora_name") and "--max-cpu-loras" in full.error[
        "message"
    ]
    again = post(lora_server, "load_lora_adapter", {"lora_name": "b", "lora_path": folders["a"]})
    assert again.status == 400 and "is loaded already" in again.error["message"]
    unloaded = post(lora_server, "unload_lora_adapter", {"lora_name": "b"})
    assert (unloaded.status, unloaded.json()["deleted"]) == (200, True)
    with pytest.raises(openai.NotFoundError):
        text("b")
    assert post(lora_server, "unload_lora_adapter", {"lora_name": "b"}).status == 404
    assert text("a") == before


def test_what_cannot_be_loaded_is_a_400_that_says_why(
    client: openai.OpenAI, lora_server: ServerProcess, folders: dict[str, str], tmp_path: Path
) -> None:
    bad = write_tiny_adapter(tmp_path / "bad", use_dora=True)
    for body, param, reason in (
        ({"lora_name": "x", "lora_path": str(bad)}, "lora_path", "'use_dora' is set"),
        ({"lora_name": "x", "lora_path": str(tmp_path / "no")}, "lora_path", "no such folder"),
        ({"lora_name": "x", "lora_path": ""}, "lora_path", "must not be empty"),
        ({"lora_name": "base", "lora_path": folders["b"]}, "lora_name", "the base model's name"),
        ({"lora_name": "", "lora_path": folders["b"]}, "lora_name", "1 to 200 printable characters"),
        ({"lora_name": "x"}, "lora_path", "lora_path"),
        ({"lora_name": "x", "lora_path": folders["b"], "rank": 3}, "rank", "rank"),
    ):
        answer = post(lora_server, "load_lora_adapter", body)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert reason in answer.error["message"]
    assert [model.id for model in client.models.list()] == ["base", "a"]


def test_operators_routes_need_the_key(lora_server: ServerProcess, folders: dict[str, str]) -> None:
    body = {"lora_name": "b", "lora_path": folders["b"]}
    assert post(lora_server, "load_lora_adapter", body, key="wrong").status == 401
    assert post(lora_server, "unload_lora_adapter", {"lora_name": "a"}, key="wrong").status == 401


def test_offline_prompts_name_an_adapter_each(tiny_model: Path, folders: dict[str, str]) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    flags: Any = {"kv_cache_memory_bytes": 64_000_000, "cpu_threads": 1, "enable_lora": True}
    with LLM(str(tiny_model), lora_modules=(f"a={folders['a']}",), **flags) as llm:
        llm.load_lora_adapter("b", folders["b"])
        mixed = llm.generate([PROMPT] * 3, params, lora=["a", None, "b"], use_tqdm=False)
        texts = [output.outputs[0].text for output in mixed]
        alone = [llm.generate(PROMPT, params, lora=lora)[0].outputs[0].text for lora in ("a", None, "b")]
        assert texts == alone and len(set(texts)) == 3
        chat = [{"role": "user", "content": PROMPT}]
        assert llm.chat(chat, params, lora="a")[0].outputs != llm.chat(chat, params)[0].outputs
        assert llm.embed(PROMPT, lora="a")[0].outputs != llm.embed(PROMPT)[0].outputs
        llm.unload_lora_adapter("a")
        with pytest.raises(ModelNotFoundError, match="no adapter 'a'"):
            llm.generate(PROMPT, params, lora="a")
        with pytest.raises(InvalidRequestError, match="3 prompts and 2 adapters"):
            llm.generate([PROMPT] * 3, params, lora=["b", None])
