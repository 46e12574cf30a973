"""Writes docs/api-fields.md, what becomes of every request field; `--check` only compares.

    python -m tools.update_api_fields [--check]

Owns the page's form, and with `api_fields.json` the facts of which field belongs to which API: the names are
those of the official SDKs' request types and of the protocol files of vLLM and SGLang. What a field does is
its description in the struct; what becomes of one that is not honoured is in the endpoint's table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import msgspec

from graphllm.server.anthropic.known_fields import COUNT_FIELDS, MESSAGES_FIELDS
from graphllm.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from graphllm.server.generation.fields import KnownField
from graphllm.server.openai.chat_protocol import ChatCompletionRequest
from graphllm.server.openai.classification import CLASSIFY_FIELDS, ClassifyRequest
from graphllm.server.openai.completion_protocol import CompletionRequest
from graphllm.server.openai.embeddings import EMBEDDING_FIELDS, EmbeddingRequest
from graphllm.server.openai.known_fields import CHAT_FIELDS, COMPLETION_FIELDS
from graphllm.server.openai.rerank import RERANK_FIELDS, RerankRequest
from graphllm.server.openai.responses.known_fields import RESPONSES_FIELDS
from graphllm.server.openai.responses.protocol import ResponsesRequest
from graphllm.server.openai.scores import SCORE_FIELDS, ScoreRequest
from graphllm.server.openai.tokenization import (
    DETOKENIZE_FIELDS,
    TOKENIZE_FIELDS,
    DetokenizeRequest,
    TokenizeRequest,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api-fields.md"
DATA = Path(__file__).with_name("api_fields.json")
INTRODUCTION = """\
# Request fields

What graphllm does with every request field of the OpenAI and Anthropic APIs and of the servers of vLLM and
SGLang. A field is honoured, refused by name (400, with the values that are accepted), or tolerated: then the
answer has an entry for it in its `warnings`. None is ignored. A field in no table is a 400 that names the
nearest known one; `--lenient` turns that into a warning. Null means the default everywhere.

Written by `tools/update_api_fields.py` from the request types; do not edit.

## How chats are understood

- **Tools.** A chat template that reads `tools` gets them. For other models they are described in the system
  message (in the first message, where a template knows no system message), with the form in which a call is
  to be written; calls and results of earlier turns become plain text. How a model writes calls is guessed
  from its template and vocabulary; `--tool-call-parser` says it. `tool_choice` required, or a function's
  name, is enforced by a grammar in the model's own format. `none` does not show the tools to the model.
- **Reasoning** is told apart (`reasoning_content` and `reasoning`, the same text under both names) as the
  template and vocabulary suggest; `--reasoning-parser` says it. `reasoning_effort` goes to the template, as
  `reasoning_effort`, `enable_thinking` or `thinking`, whichever it reads. Reasoning of earlier turns goes to
  templates that read it.
- **The answer's form** (`response_format` and its relatives) is enforced from behind the reasoning on. Where
  a model reasons by itself, its reasoning is opened in the prompt. Beside tools the answer is calls or has
  the form; a `grammar` leaves no room for calls, which is a warning.
- **Stops.** `stop_reason` and `matched_stop` both hold the stop text or token that ended a choice.
- **Echoed prompts** in a stream have log probabilities up to 2,048 numbers, since one chunk holds them all.
  `prompt_logprobs` come in whole answers only.
"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """key: in `api_fields.json`."""

    key: str
    route: str
    struct: type[msgspec.Struct]
    known_fields: Mapping[str, KnownField]


ENDPOINTS = (
    Endpoint("chat", "POST /v1/chat/completions", ChatCompletionRequest, CHAT_FIELDS),
    Endpoint("completions", "POST /v1/completions", CompletionRequest, COMPLETION_FIELDS),
    Endpoint("responses", "POST /v1/responses", ResponsesRequest, RESPONSES_FIELDS),
    Endpoint("messages", "POST /v1/messages", MessagesRequest, MESSAGES_FIELDS),
    Endpoint("count_tokens", "POST /v1/messages/count_tokens", CountTokensRequest, COUNT_FIELDS),
    Endpoint("embeddings", "POST /v1/embeddings", EmbeddingRequest, EMBEDDING_FIELDS),
    Endpoint("score", "POST /v1/score", ScoreRequest, SCORE_FIELDS),
    Endpoint("rerank", "POST /v1/rerank", RerankRequest, RERANK_FIELDS),
    Endpoint("classify", "POST /v1/classify", ClassifyRequest, CLASSIFY_FIELDS),
    Endpoint("tokenize", "POST /tokenize", TokenizeRequest, TOKENIZE_FIELDS),
    Endpoint("detokenize", "POST /detokenize", DetokenizeRequest, DETOKENIZE_FIELDS),
)


def fields_of_apis(key: str) -> dict[str, list[str]]:
    """The names of an endpoint's fields, by API."""
    found: dict[str, list[str]] = json.loads(DATA.read_text(encoding="utf-8"))[key]
    return found


def descriptions(struct: type[msgspec.Struct]) -> dict[str, str]:
    """What each field of a struct does. Raises ValueError for a field that does not say."""
    hints = get_type_hints(struct, include_extras=True)
    found = {}
    for name in struct.__struct_fields__:
        metadata = get_args(hints[name])[1:] if get_origin(hints[name]) is Annotated else ()
        texts = [entry.description for entry in metadata if isinstance(entry, msgspec.Meta)]
        if not texts or texts[0] is None:
            raise ValueError(f"{struct.__name__}.{name} has no description")
        found[name] = texts[0]
    return found


def page() -> str:
    """The whole document."""
    return "\n".join([INTRODUCTION, *(_section(endpoint) for endpoint in ENDPOINTS)])


def _section(endpoint: Endpoint) -> str:
    apis = fields_of_apis(endpoint.key)
    honoured = descriptions(endpoint.struct)
    names = sorted({*honoured, *endpoint.known_fields})
    lines = [f"## {endpoint.route}", "", "| field | known to | what graphllm does |", "| --- | --- | --- |"]
    for name in names:
        known_to = ", ".join(api for api, fields in apis.items() if name in fields) or "graphllm"
        what = honoured.get(name) or _of_known(endpoint.known_fields[name])
        lines.append(f"| `{name}` | {known_to} | {_escaped(what)} |")
    return "\n".join([*lines, ""])


def _of_known(known: KnownField) -> str:
    accepted = " or ".join(f"`{json.dumps(value)}`" for value in known.neutral)
    if known.is_tolerated:
        kept = f" other than {accepted}" if accepted else ""
        return f"Tolerated with a warning{kept}. {known.note}"
    return f"Refused{f', {accepted} aside' if accepted else ''}. {known.note}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/api-fields.md.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if it is not current"
    )
    check = parser.parse_args().check
    current = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == current:
        return 0
    if check:
        print("docs/api-fields.md is not current: run python -m tools.update_api_fields", file=sys.stderr)
        return 1
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
