"""POST /v1/rerank: documents in the order of how well they answer a query.

Owns the route and its JSON, which is Jina's and Cohere's where they agree, as vLLM has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from graphllm.errors import InvalidRequestError
from graphllm.server.generation.admission import Admission
from graphllm.server.generation.decoding import BodyDecoder
from graphllm.server.generation.fields import KnownField
from graphllm.server.generation.pooled_replies import PooledReply
from graphllm.server.generation.pooled_texts import check_number, pair_scores, pooled_truncation
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Request, Response
from graphllm.server.openai.scores import SCORE_FIELDS, PooledBody, check_salt

RERANK_FIELDS: Final[Mapping[str, KnownField]] = {
    **SCORE_FIELDS,
    "max_chunks_per_doc": KnownField(note="Documents are judged whole."),
    "max_tokens_per_doc": KnownField(note="Send `truncate_prompt_tokens`, which counts the query too."),
    "rank_fields": KnownField(note="Documents have one text."),
}


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """A document as an object."""

    text: str


class RerankRequest(PooledBody, kw_only=True):
    """The body of POST /v1/rerank."""

    query: Annotated[str, Meta(description="What the documents are to answer.")]
    documents: Annotated[list[str | Document], Meta(description='Texts, or objects such as {"text": "..."}.')]
    top_n: Annotated[int | None, Meta(description="So many of the best; by default, and with 0, all.")] = None
    return_documents: Annotated[
        bool | None, Meta(description="false leaves the documents out of the answer.")
    ] = None
    instruction: Annotated[
        str | None, Meta(description="What to judge by, for models that can be told (Qwen3-Reranker).")
    ] = None


class Reranking:
    """Scores each document, in one engine request each."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._decoder = BodyDecoder(RerankRequest, RERANK_FIELDS, lenient=served.lenient)

    def create(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for what is wrong with the body; documents may fail later."""
        served = self._served
        body = served.decode(request, self._decoder)
        fields, engine = body.fields, served.engine
        check_salt(fields)
        documents = _texts(fields)
        pairs = pair_scores(
            engine,
            [(fields.query, document) for document in documents],
            truncated=pooled_truncation(engine, fields.truncate_prompt_tokens, None),
            instruction=fields.instruction,
            is_raw=fields.use_activation is False,
            params=("query", "documents"),
        )

        def finish(reply: PooledReply, results: list[Any]) -> dict[str, Any]:
            scores = pairs.scores(results)
            best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
            entries = []
            for index in best[: fields.top_n or None]:
                entry: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
                if fields.return_documents is not False:
                    entry["document"] = {"text": documents[index]}
                entries.append(entry)
            return {"id": reply.id, "model": reply.model, "results": entries, "usage": reply.usage}

        reply = PooledReply(
            served,
            model=fields.model,
            prefix="rerank",
            take=lambda position, result: result,
            finish=finish,
            param="documents",
            warnings=body.warnings,
            request=request,
            response=response,
            cache_salt=fields.cache_salt,
            priority=fields.priority,
        )
        Admission(pairs.inputs(), reply.submit, request=request, response=response).proceed()


def _texts(fields: RerankRequest) -> list[str]:
    """Raises InvalidRequestError."""
    if not fields.documents:
        raise InvalidRequestError("'documents' must not be an empty array.", param="documents")
    check_number(fields.documents, "documents")
    if fields.top_n is not None and fields.top_n < 0:
        raise InvalidRequestError(f"'top_n' must be at least 0, not {fields.top_n}.", param="top_n")
    return [each if isinstance(each, str) else each.text for each in fields.documents]
