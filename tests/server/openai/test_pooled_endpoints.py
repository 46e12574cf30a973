"""Vectors, scores and labels through the routes, beside transformers and what the files say."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.pooled_models import (
    END,
    HIDDEN,
    SEPARATOR,
    START,
    byte_ids,
    hidden_states,
    write_json,
    write_model,
    write_sentence_transformer,
)
from tests.server.real_server import RealServer

TOLERANCE = 1e-4
LAST = {"pooling_mode_lasttoken": True}
CLS = {"pooling_mode_cls_token": True}
PROMPTS = {
    "prompts": {"query": "Instruct: find\nQuery:", "document": "", "plain": "p: "},
    "default_prompt_name": None,
    "similarity_fn_name": "cosine",
}
PAIRS = [("a query", "a text"), ("a query", "another, longer text"), ("a query", "x")]


@contextmanager
def serving(folder: Path, **flags: Any) -> Iterator[RealServer]:
    server = RealServer(folder, **flags)
    try:
        yield server
        assert server.engine.num_unfinished_requests == 0
    finally:
        server.close()


def close_to(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(np.array(found)).float(), torch.as_tensor(expected).float(), rtol=0.0, atol=TOLERANCE
    )


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


@pytest.fixture(scope="module")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qwen3-embedding")


@pytest.fixture(scope="module")
def model(embedder_folder: Path) -> PreTrainedModel:
    """Qwen3-Embedding's form: a text's last token, EOS behind it, prompts, names without a prefix."""
    folder = embedder_folder
    model = write_model(folder, "Qwen3Model", tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    # As it is published: the class of its weights is not the one that it names.
    config |= {"architectures": ["Qwen3ForCausalLM"], "matryoshka_dimensions": [8, 16]}
    write_json(folder / "config.json", config)
    write_sentence_transformer(folder, pooling=LAST, settings=PROMPTS)
    return model


@pytest.fixture(scope="module")
def embedder(embedder_folder: Path, model: PreTrainedModel) -> Iterator[RealServer]:
    with serving(embedder_folder) as server:
        yield server


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("generates")
    write_model(folder, "LlamaForCausalLM")
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("scorer")
    write_model(folder, "BertForSequenceClassification", num_labels=1)
    with serving(folder) as server:
        yield server


def vector_of(model: PreTrainedModel, text: str) -> torch.Tensor:
    return unit(hidden_states(model, [*byte_ids(text), END])[-1])


def test_vectors_equal_transformers(embedder: RealServer, model: PreTrainedModel) -> None:
    texts = ["Hello", "a longer text with more words", "é"]
    answer = embedder.post("/v1/embeddings", input=texts)
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    for entry, text in zip(answer["data"], texts, strict=True):
        close_to(entry["embedding"], vector_of(model, text))
    num_tokens = sum(len(byte_ids(text)) + 1 for text in texts)
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({"prompt_name": "query"}, "Instruct: find\nQuery:"),
        ({"prompt_name": "plain"}, "p: "),
        ({"input_type": "query"}, "Instruct: find\nQuery:"),
        ({"input_type": "search_query"}, "Instruct: find\nQuery:"),
        ({"input_type": "passage"}, ""),
        ({}, ""),
    ],
)
def test_prompts_go_in_front(
    embedder: RealServer, model: PreTrainedModel, fields: dict[str, str], prefix: str
) -> None:
    answer = embedder.post("/v1/embeddings", input="Hello", **fields)
    close_to(answer["data"][0]["embedding"], vector_of(model, prefix + "Hello"))


def test_vectors_are_cut_and_have_length_1_again(embedder: RealServer, model: PreTrainedModel) -> None:
    answer = embedder.post("/v1/embeddings", input="Hello", dimensions=8)
    close_to(answer["data"][0]["embedding"], unit(vector_of(model, "Hello")[:8]))
    whole = embedder.post("/v1/embeddings", input="Hello", dimensions=HIDDEN)
    close_to(whole["data"][0]["embedding"], vector_of(model, "Hello"))


def test_vectors_as_they_are_and_in_base64(embedder: RealServer, model: PreTrainedModel) -> None:
    answer = embedder.post("/v1/embeddings", input="Hello", normalize=False, encoding_format="base64")
    found = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), dtype="<f4")
    close_to(found, hidden_states(model, [*byte_ids("Hello"), END])[-1])


def test_token_ids_are_taken_as_they_are(embedder: RealServer, model: PreTrainedModel) -> None:
    answer = embedder.post("/v1/embeddings", input=[[5, 6, 7], [8]])
    close_to(answer["data"][0]["embedding"], unit(hidden_states(model, [5, 6, 7])[-1]))


@pytest.mark.parametrize(("side", "kept"), [(None, "Hello"), ("right", "Hello"), ("left", "there")])
def test_a_cut_text_keeps_what_is_around_it(
    embedder: RealServer, model: PreTrainedModel, side: str | None, kept: str
) -> None:
    answer = embedder.post(
        "/v1/embeddings", input="Hello there", truncate_prompt_tokens=6, truncation_side=side
    )
    assert answer["usage"]["prompt_tokens"] == 6
    close_to(answer["data"][0]["embedding"], vector_of(model, kept))


def test_similarity_is_a_score(embedder: RealServer, model: PreTrainedModel) -> None:
    """Of a query and documents, each with its prompt; texts that come twice are computed once."""
    answer = embedder.post("/v1/score", text_1="a", text_2=["b", "a", "b"])
    query = vector_of(model, "Instruct: find\nQuery:a")
    expected = [float(query @ vector_of(model, text)) for text in ("b", "a", "b")]
    close_to([entry["score"] for entry in answer["data"]], expected)
    prompt = len(byte_ids("Instruct: find\nQuery:a")) + 1
    assert answer["usage"]["prompt_tokens"] == prompt + 2 + 2


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"dimensions": 12}, "dimensions", "must be one of 8, 16, not 12"),
        ({"dimensions": 0}, "dimensions", "must be one of 8, 16"),
        ({"prompt_name": "nothing"}, "prompt_name", "no prompt 'nothing'; it has query, document, plain"),
        ({"input_type": "poem"}, "input_type", "must be one of query"),
        ({"input_type": "query", "prompt_name": "query"}, "input_type", "both choose a prompt"),
        ({"prompt_name": "query", "input": [1, 2]}, "prompt_name", "not of token ids"),
        ({"input_type": "query", "input": [[1, 2]]}, "input_type", "not of token ids"),
        ({"input": "x" * 300}, "input", "context is 256 tokens"),
        ({"input": ["x", [1]]}, "input", "must all be texts"),
        ({"input": []}, "input", "must not be an empty array"),
        ({"input": [[]]}, "input", "is empty"),
        ({"input": [260]}, "input", "token ids 0 to 259"),
        ({"truncation_side": "left"}, "truncation_side", "only allowed with truncate_prompt_tokens"),
    ],
)
def test_what_cannot_be_is_refused(
    embedder: RealServer, fields: dict[str, Any], param: str, message: str
) -> None:
    found, text = embedder.refusal("/v1/embeddings", **({"input": "Hello"} | fields))
    assert found == param
    assert message in text


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}),
    ],
)
def test_generating_is_refused_by_what_the_model_is_for(
    embedder: RealServer, route: str, fields: dict[str, Any]
) -> None:
    status, answer = embedder.ask(route, {"model": "tiny", **fields})
    assert status == 400
    assert "is for embeddings and generates no text; use /v1/embeddings" in answer.decode()


def test_labels_are_refused(embedder: RealServer) -> None:
    param, message = embedder.refusal("/v1/classify", input="x")
    assert param == "model" and "published for embeddings" in message


def test_a_file_that_asks_for_an_end_of_text_token_gets_it(tmp_path: Path) -> None:
    """e5-mistral's form: tokenizer.json does not append it, tokenizer_config.json says `add_eos_token`."""
    model = write_model(tmp_path, "MistralModel", sliding_window=None)
    backend = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    write_json(tmp_path / "tokenizer.json", backend)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>", "add_eos_token": True})
    with serving(tmp_path) as server:
        answer = server.post("/v1/embeddings", input="Hello")
        close_to(answer["data"][0]["embedding"], unit(hidden_states(model, [*byte_ids("Hello"), END])[-1]))
        cut = server.post("/v1/embeddings", input="Hello", truncate_prompt_tokens=3)
        close_to(cut["data"][0]["embedding"], unit(hidden_states(model, [*byte_ids("He"), END])[-1]))


def test_the_default_prompt_goes_in_front_where_none_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path, "Qwen2Model")
    settings = PROMPTS | {"default_prompt_name": "plain"}
    write_sentence_transformer(tmp_path, pooling=LAST, settings=settings, normalizes=False)
    with serving(tmp_path) as server:
        answer = server.post("/v1/embeddings", input="Hello")
        ids = [*byte_ids("p: Hello"), END]
        close_to(answer["data"][0]["embedding"], hidden_states(model, ids)[-1])  # not normalized either
        param, message = server.refusal("/v1/embeddings", input="Hello", dimensions=4)
        assert param == "dimensions" and "does not say that they may be cut short" in message


@pytest.mark.parametrize("architecture", ["BertModel", "XLMRobertaModel"])
def test_an_encoder_gives_the_vector_of_its_first_token(tmp_path: Path, architecture: str) -> None:
    model = write_model(tmp_path, architecture)
    write_sentence_transformer(tmp_path, pooling=CLS)
    end = SEPARATOR if architecture == "BertModel" else END
    with serving(tmp_path) as server:
        texts = ["Hello", "a text", "x" * 290]
        answer = server.post("/v1/embeddings", input=texts)
        for entry, text in zip(answer["data"], texts, strict=True):
            ids = [START, *byte_ids(text), end]
            close_to(entry["embedding"], unit(hidden_states(model, ids)[0]))


def logits_of(model: PreTrainedModel, ids: list[int], **arguments: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids]), **arguments).logits[0]
    return logits


def bert_logits(model: PreTrainedModel, query: str, document: str) -> torch.Tensor:
    first, second = [START, *byte_ids(query), SEPARATOR], [*byte_ids(document), SEPARATOR]
    types = torch.tensor([[0] * len(first) + [1] * len(second)])
    return logits_of(model, first + second, token_type_ids=types)


def roberta_logits(model: PreTrainedModel, query: str, document: str) -> torch.Tensor:
    return logits_of(model, [START, *byte_ids(query), END, END, *byte_ids(document), END])


def decoder_logits(model: PreTrainedModel, query: str, document: str) -> torch.Tensor:
    return logits_of(model, byte_ids(query) + byte_ids(document))


SCORERS: dict[str, Callable[[PreTrainedModel, str, str], torch.Tensor]] = {
    "BertForSequenceClassification": bert_logits,
    "XLMRobertaForSequenceClassification": roberta_logits,
    "Qwen3ForSequenceClassification": decoder_logits,
    "LlamaForSequenceClassification": decoder_logits,
    "Gemma2ForSequenceClassification": decoder_logits,
}


@pytest.mark.parametrize("architecture", SCORERS)
def test_scores_equal_transformers(tmp_path: Path, architecture: str) -> None:
    model = write_model(tmp_path, architecture, num_labels=1)
    expected = [float(SCORERS[architecture](model, *pair)[0]) for pair in PAIRS]
    texts = [document for _, document in PAIRS]
    with serving(tmp_path) as server:
        assert server.engine.pooling.labels == ("LABEL_0",)
        answer = server.post("/v1/score", text_1="a query", text_2=texts)
        close_to([entry["score"] for entry in answer["data"]], torch.tensor(expected).sigmoid())
        assert answer["object"] == "list" and answer["data"][1]["object"] == "score"
        raw = server.post("/score", text_1=["a query"] * 3, text_2=texts, use_activation=False)
        close_to([entry["score"] for entry in raw["data"]], expected)
        best = sorted(range(3), key=expected.__getitem__, reverse=True)
        for route in ("/rerank", "/v1/rerank", "/v2/rerank"):
            ranked = server.post(route, query="a query", documents=[texts[0], {"text": texts[1]}, texts[2]])
            assert [entry["index"] for entry in ranked["results"]] == best
            assert [entry["document"]["text"] for entry in ranked["results"]] == [texts[i] for i in best]
            close_to(
                [entry["relevance_score"] for entry in ranked["results"]],
                torch.tensor(expected).sigmoid()[best],
            )
        top = server.post("/rerank", query="a query", documents=texts, top_n=2, return_documents=False)
        assert [entry["index"] for entry in top["results"]] == best[:2]
        assert "document" not in top["results"][0]


def test_a_long_pair_loses_its_ends_where_it_may(tmp_path: Path) -> None:
    model = write_model(tmp_path, "BertForSequenceClassification", num_labels=1)
    query, document = "q" * 20, "d" * 400
    with serving(tmp_path) as server:
        param, message = server.refusal("/v1/score", text_1=query, text_2=document)
        assert param == "text_2" and "context is 300 tokens" in message
        answer = server.post(
            "/v1/score", text_1=query, text_2=document, truncate_prompt_tokens=-1, use_activation=False
        )
        close_to(answer["data"][0]["score"], bert_logits(model, query, "d" * 277)[0])
        assert answer["usage"]["prompt_tokens"] == 300


@pytest.mark.parametrize(
    ("keys", "activation"),
    [
        ({"problem_type": "regression"}, lambda logits: logits),
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({}, lambda logits: logits.softmax(0)),
    ],
)
def test_labels_equal_transformers(
    tmp_path: Path, keys: dict[str, str], activation: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    labels = {0: "bad", 1: "fine", 2: "good"}
    model = write_model(tmp_path, "BertForSequenceClassification", id2label=labels, **keys)
    with serving(tmp_path) as server:
        texts = ["Hello", "a text", "another"]
        for route in ("/classify", "/v1/classify"):
            answer = server.post(route, input=texts)
            for entry, text in zip(answer["data"], texts, strict=True):
                logits = logits_of(model, [START, *byte_ids(text), SEPARATOR])
                close_to(entry["probs"], activation(logits))
                assert entry["label"] == labels[int(logits.argmax())]
                assert entry["num_classes"] == 3
        param, message = server.refusal("/v1/score", text_1="a", text_2="b")
        assert param == "model" and "tells 3 labels apart" in message
        assert server.refusal("/v1/embeddings", input="x")[0] == "model"
        assert server.refusal("/v1/completions", prompt="x")[0] == "model"


IDENTITY = "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("config.json", {"sentence_transformers": {"activation_fn": IDENTITY, "version": "5"}}),
        ("config.json", {"sbert_ce_default_activation_function": IDENTITY}),
        ("config_sentence_transformers.json", {"activation_fn": IDENTITY, "model_type": "CrossEncoder"}),
    ],
)
def test_a_cross_encoder_names_its_activation(tmp_path: Path, file: str, keys: dict[str, Any]) -> None:
    model = write_model(tmp_path, "BertForSequenceClassification", num_labels=1)
    path = tmp_path / file
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | keys)
    with serving(tmp_path) as server:
        answer = server.post("/v1/score", text_1="a query", text_2="a text")
        close_to(answer["data"][0]["score"], bert_logits(model, "a query", "a text")[0])


def test_a_tokenizer_that_hands_on_no_types_leaves_them_zero(tmp_path: Path) -> None:
    model = write_model(tmp_path, "BertForSequenceClassification", num_labels=1)
    names = {"eos_token": "</s>", "model_input_names": ["input_ids", "attention_mask"]}
    write_json(tmp_path / "tokenizer_config.json", names)
    ids = [START, *byte_ids("a query"), SEPARATOR, *byte_ids("a text"), SEPARATOR]
    with serving(tmp_path) as server:
        answer = server.post("/v1/score", text_1="a query", text_2="a text", use_activation=False)
        close_to(answer["data"][0]["score"], logits_of(model, ids)[0])


@pytest.mark.parametrize("is_tied", [True, False])
def test_qwen3_reranker_judges_by_yes_and_no(tmp_path: Path, is_tied: bool) -> None:
    """Published as a model that generates; a score is yes' probability among the two, by its own words."""
    folder = tmp_path / "Qwen3-Reranker-0.6B"
    folder.mkdir()
    model = write_model(
        folder, "Qwen3ForCausalLM", tie_word_embeddings=is_tied, vocab_size=262, max_position_embeddings=1024
    )
    backend = json.loads((folder / "tokenizer.json").read_text())
    for token_id, text in ((260, "yes"), (261, "no")):
        backend["added_tokens"].append(
            {
                "id": token_id,
                "content": text,
                "single_word": True,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": False,
            }
        )
    backend["post_processor"] = None
    write_json(folder / "tokenizer.json", backend)
    with serving(folder, max_model_len=1024) as server:
        tokenizer = server.engine.tokenizer
        for instruction in (None, "Judge well"):
            task = instruction or "Given a web search query, retrieve relevant passages that answer the query"
            text = (
                "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
                'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
                f"<|im_start|>user\n<Instruct>: {task}\n<Query>: a query\n<Document>: a text<|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\n"
            )
            logits = logits_of(model, tokenizer.encode(text))[-1]
            expected = torch.stack((logits[261], logits[260])).softmax(0)[1]
            answer = server.post("/v1/score", text_1="a query", text_2="a text", instruction=instruction)
            close_to(answer["data"][0]["score"], expected)
        _, message = server.refusal("/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}])
        assert "is for scores and generates no text" in message
        param, message = server.refusal("/v1/score", text_1="a", text_2="b", truncate_prompt_tokens=10)
        assert param == "truncate_prompt_tokens" and "are too few" in message


@pytest.mark.parametrize(
    ("route", "fields", "message"),
    [
        ("/v1/score", {"text_1": "a", "text_2": "b"}, "generates text; scores need a model"),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, "generates text; scores need a model"),
        ("/v1/classify", {"input": "a"}, "published for generating text"),
    ],
)
def test_a_model_that_generates_is_refused_for_scores(
    generator: RealServer, route: str, fields: dict[str, Any], message: str
) -> None:
    param, text = generator.refusal(route, **fields)
    assert param == "model" and message in text


def test_a_model_that_generates_has_vectors_all_the_same(generator: RealServer) -> None:
    vector = generator.post("/v1/embeddings", input="Hello")["data"][0]["embedding"]
    assert float(np.linalg.norm(vector)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("route", "fields", "param", "message"),
    [
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1", "must not be an empty array"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2", "must not be an empty array"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1", "has 2 entries and 'text_2' 1"),
        ("/v1/score", {"text_1": "a", "text_2": ["a"] * 1025}, "text_2", "at most 1024"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "instruction": "x"}, "instruction", "takes no"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents", "must not be an empty array"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n", "at least 0"),
        ("/v1/rerank", {"query": "a", "documents": ["d" * 400]}, "documents", "context is 300"),
        ("/v1/classify", {"input": "a", "cache_salt": ""}, "cache_salt", "must not be empty"),
        ("/v1/classify", {"input": [300]}, "input", "token ids 0 to 259"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    scorer: RealServer, route: str, fields: dict[str, Any], param: str, message: str
) -> None:
    found, text = scorer.refusal(route, **fields)
    assert found == param
    assert message in text
