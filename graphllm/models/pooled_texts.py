"""Texts for a model of vectors or scores: prompts in front, what is around them, two texts in one, and what
the results mean.

Owns what was published of that beside the weights. Which tokens a text has is the tokenizer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from graphllm.errors import InvalidRequestError
from graphllm.models.pooling import PoolingConfig
from graphllm.tokenizer.tokenizer import Tokenizer

Vector = npt.NDArray[np.float32]

# What a text is for, in other servers' words, and the names under which models publish a prompt for it.
_PROMPTS_OF_TYPE: Final = {
    "query": ("query", "search_query", "retrieval.query"),
    "document": ("document", "passage", "search_document", "retrieval.passage"),
}
_INPUT_TYPES: Final = {
    "query": "query",
    "search_query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
}

# How Qwen3-Reranker is asked (https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, arXiv:2506.05176).
_JUDGE_BEFORE: Final = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_JUDGE_BEHIND: Final = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_JUDGE_INSTRUCTION: Final = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """How the texts of one request become token ids.

    max_tokens: of a text, with what is around it. is_cut: a longer one loses its end (with keeps_first) or
    its beginning, instead of being refused. prompt: goes in front of each. param: the request's field, for
    errors.
    """

    tokenizer: Tokenizer
    pooling: PoolingConfig
    max_tokens: int
    is_cut: bool = False
    keeps_first: bool = True
    prompt: str = ""
    add_special_tokens: bool = True
    param: str = "input"

    def ids(self, text: str) -> list[int]:
        """Raises InvalidRequestError, for an empty text too, and ContextLengthError."""
        pooling, tokenizer = self.pooling, self.tokenizer
        text = self.prompt + text
        if pooling.lowercases:
            text = text.lower()
        appended = None
        if self.add_special_tokens and pooling.purpose != "generate":
            appended = tokenizer.appended_eos_id
        limit = self.max_tokens - (appended is not None)
        if self.is_cut:
            token_ids = tokenizer.encode_cut(
                text,
                max_tokens=limit,
                keeps_first=self.keeps_first,
                add_special_tokens=self.add_special_tokens,
                param=self.param,
            )
        else:
            token_ids = tokenizer.encode(
                text, add_special_tokens=self.add_special_tokens, max_tokens=limit, param=self.param
            )
        if appended is not None and token_ids[-1:] != [appended]:
            token_ids.append(appended)
        if not token_ids:
            raise InvalidRequestError(
                "A text is empty; the model needs at least one token.", param=self.param
            )
        return token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class PairEncoder:
    """How a query and a document become the ids of one text, by the model's own rule.

    instruction: what the model is to judge by, where it can be told. is_cut: longer pairs lose their ends.
    params: the request's fields that queries and documents are in, for errors.
    """

    tokenizer: Tokenizer
    pooling: PoolingConfig
    max_tokens: int
    params: tuple[str, str]
    instruction: str | None = None
    is_cut: bool = False

    def ids(self, query: str, document: str) -> list[int]:
        """Raises InvalidRequestError and ContextLengthError."""
        pooling = self.pooling
        if pooling.score_tokens is not None:
            return self._judged(query, document)
        ids, types = self.tokenizer.encode_pair(
            query, document, max_tokens=self.max_tokens, is_cut=self.is_cut, params=self.params
        )
        if not ids:
            raise InvalidRequestError(
                "The texts are empty; the model needs at least one token.", param=self.params[1]
            )
        if pooling.type_stride == 0:
            return ids
        return [token_id + pooling.type_stride * kind for token_id, kind in zip(ids, types, strict=True)]

    def _judged(self, query: str, document: str) -> list[int]:
        tokenizer, param = self.tokenizer, self.params[len(query) <= len(document)]
        before, behind = (
            tokenizer.encode(text, add_special_tokens=False) for text in (_JUDGE_BEFORE, _JUDGE_BEHIND)
        )
        num_around = len(before) + len(behind)
        limit = self.max_tokens - num_around
        if limit < 1:
            raise InvalidRequestError(
                f"{self.max_tokens} tokens are too few: the model's own instructions have {num_around}.",
                param="truncate_prompt_tokens" if self.is_cut else param,
            )
        text = (
            f"<Instruct>: {self.instruction or _JUDGE_INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
        )
        if self.is_cut:
            ids = tokenizer.encode_cut(
                text, max_tokens=limit, keeps_first=True, add_special_tokens=False, param=param
            )
        else:
            ids = tokenizer.encode(text, add_special_tokens=False, max_tokens=limit, param=param)
        return [*before, *ids, *behind]


def check_instruction(pooling: PoolingConfig, instruction: str | None) -> None:
    """Raises InvalidRequestError where the model cannot be told what to judge by."""
    if instruction is not None and pooling.score_tokens is None:
        raise InvalidRequestError("This model takes no 'instruction'.", param="instruction")


def find_prompt(pooling: PoolingConfig, prompt_name: str | None, input_type: str | None) -> str:
    """The text in front of texts: by its published name, by what they are for, or the model's default.

    A model that publishes no prompt for a kind of text wants none in front of it. Raises InvalidRequestError
    for a name that the model does not have.
    """
    if prompt_name is not None and input_type is not None:
        raise InvalidRequestError(
            "'prompt_name' and 'input_type' both choose a prompt; send one.", param="input_type"
        )
    if prompt_name is not None:
        if prompt_name not in pooling.prompts:
            names = ", ".join(pooling.prompts) or "none"
            raise InvalidRequestError(
                f"The model has no prompt {prompt_name[:60]!r}; it has {names}.", param="prompt_name"
            )
        return pooling.prompts[prompt_name]
    if input_type is not None:
        if input_type not in _INPUT_TYPES:
            raise InvalidRequestError(
                f"'input_type' must be one of {', '.join(_INPUT_TYPES)}, not {input_type[:60]!r}.",
                param="input_type",
            )
        return prompt_for(pooling, _INPUT_TYPES[input_type])
    return "" if pooling.default_prompt is None else pooling.prompts[pooling.default_prompt]


def prompt_for(pooling: PoolingConfig, kind: str) -> str:
    """The published prompt for queries ("query") or documents ("document"), "" where there is none."""
    prompts = pooling.prompts
    return next((prompts[name] for name in _PROMPTS_OF_TYPE[kind] if name in prompts), "")


def check_scores(pooling: PoolingConfig) -> None:
    """Raises InvalidRequestError for a model that gives no score for two texts."""
    if pooling.purpose == "generate":
        raise InvalidRequestError(
            "This model generates text; scores need a model that was published for scores or embeddings.",
            param="model",
        )
    if len(pooling.labels) > 1:
        raise InvalidRequestError(
            f"This model tells {len(pooling.labels)} labels apart and has no one score; use /v1/classify.",
            param="model",
        )


def activated(logits: Sequence[float], pooling: PoolingConfig, *, is_raw: bool) -> list[float]:
    """Scores as the model's makers mean them, or the logits themselves."""
    if is_raw or pooling.activation == "identity":
        return [*logits]
    if pooling.activation == "sigmoid":
        return [_sigmoid(logit) for logit in logits]
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))


def similarity(first: Vector, second: Vector, name: str) -> float:
    """How alike two vectors are, more for a larger number; distances count as negative."""
    if name == "dot":
        return float(first @ second)
    if name == "euclidean":
        return -float(np.linalg.norm(first - second))
    if name == "manhattan":
        return -float(np.abs(first - second).sum())
    lengths = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return float(first @ second) / lengths if lengths else 0.0
