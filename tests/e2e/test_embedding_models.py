"""A server of a model for vectors, and one for scores, with the OpenAI client and plain HTTP."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import openai
import pytest
import torch

from tests.e2e.serving import running_server
from tests.pooled_models import (
    END,
    SEPARATOR,
    START,
    byte_ids,
    hidden_states,
    write_model,
    write_sentence_transformer,
)

TOLERANCE = 1e-4
PROMPT = "Instruct: find\nQuery:"


def test_vectors_through_the_openai_client(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = write_model(folder, "Qwen3Model")
    settings = {"prompts": {"query": PROMPT}, "default_prompt_name": None}
    write_sentence_transformer(folder, pooling={"pooling_mode_lasttoken": True}, settings=settings)

    def expected(text: str) -> torch.Tensor:
        state = hidden_states(model, [*byte_ids(text), END])[-1]
        return state / state.norm()

    flags = ("--model", str(folder), "--served-model-name", "e", "--matryoshka-dimensions", "8,16")
    with (
        running_server(tmp_path, *flags, "--api-key", "secret") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client,
    ):
        texts = [f"text number {index} " * (1 + index % 7) for index in range(40)]
        answer = client.embeddings.create(model="e", input=texts)
        for entry, text in zip(answer.data, texts, strict=True):
            assert np.abs(np.array(entry.embedding) - expected(text).numpy()).max() < TOLERANCE
        assert answer.usage.prompt_tokens == sum(len(byte_ids(text)) + 1 for text in texts)
        short = client.embeddings.create(
            model="e", input="Hello", dimensions=8, extra_body={"prompt_name": "query"}
        )
        wanted = expected(PROMPT + "Hello")[:8]
        assert np.abs(np.array(short.data[0].embedding) - (wanted / wanted.norm()).numpy()).max() < TOLERANCE
        raw = client.embeddings.with_raw_response.create(model="e", input="Hello", encoding_format="base64")
        stored = base64.b64decode(raw.http_response.json()["data"][0]["embedding"])
        assert np.abs(np.frombuffer(stored, "<f4") - expected("Hello").numpy()).max() < TOLERANCE
        with pytest.raises(openai.BadRequestError, match="is for embeddings and generates no text"):
            client.chat.completions.create(model="e", messages=[{"role": "user", "content": "Hi"}])
        with pytest.raises(openai.BadRequestError, match="must be one of 8, 16, not 12"):
            client.embeddings.create(model="e", input="Hello", dimensions=12)
        assert server.request("POST", "/score", {"model": "e", "text_1": "a", "text_2": "b"}).status == 401
        server.wait_until_idle()


def test_scores_over_http(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = write_model(folder, "BertForSequenceClassification", num_labels=1)
    documents = [f"document {index}" * (1 + index % 3) for index in range(30)]
    scores = []
    for document in documents:
        first, second = [START, *byte_ids("a query"), SEPARATOR], [*byte_ids(document), SEPARATOR]
        types = torch.tensor([[0] * len(first) + [1] * len(second)])
        with torch.inference_mode():
            logits = model(torch.tensor([first + second]), token_type_ids=types).logits
        scores.append(float(logits.sigmoid()))
    with running_server(tmp_path, "--model", str(folder), "--served-model-name", "r") as server:
        body = {"model": "r", "query": "a query", "documents": documents, "top_n": 10}
        answer = server.request("POST", "/v1/rerank", body).json()
        found = [(entry["index"], entry["relevance_score"]) for entry in answer["results"]]
        assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
        assert all(abs(score - scores[index]) < TOLERANCE for index, score in found)
        assert min(score for _, score in found) >= sorted(scores)[-10] - TOLERANCE
        server.wait_until_idle()
