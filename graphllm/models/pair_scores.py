"""How well texts go together, from pairs to numbers.

Owns which texts are computed for a pair: a model for scores reads both as one text; a model for vectors
embeds each, and their similarity is the score.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from graphllm.models.pooled_texts import (
    PairEncoder,
    TextEncoder,
    activated,
    check_instruction,
    check_scores,
    prompt_for,
    similarity,
)
from graphllm.models.pooling import PoolingConfig
from graphllm.tokenizer.tokenizer import Tokenizer


class PairScores:
    """The scores of pairs: what is computed for them, and what they are in the end.

    pairs: (query, document). max_tokens: of what is computed for one; is_cut: longer ones lose their ends.
    is_raw: logits and not what the makers make of them. params: the request's fields that queries and
    documents are in, for errors. Raises InvalidRequestError for a model that gives no
    scores of pairs, and for an instruction that it cannot take.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pooling: PoolingConfig,
        pairs: Sequence[tuple[str, str]],
        *,
        max_tokens: int,
        is_cut: bool = False,
        instruction: str | None = None,
        is_raw: bool = False,
        params: tuple[str, str],
    ) -> None:
        check_scores(pooling)
        check_instruction(pooling, instruction)
        self._pooling = pooling
        self._pairs = pairs
        self._is_raw = is_raw
        self._pair_encoder = PairEncoder(
            tokenizer=tokenizer,
            pooling=pooling,
            max_tokens=max_tokens,
            instruction=instruction,
            is_cut=is_cut,
            params=params,
        )
        # For models of vectors: queries and documents have prompts of their own.
        self._encoders = {
            kind: TextEncoder(
                tokenizer=tokenizer,
                pooling=pooling,
                max_tokens=max_tokens,
                is_cut=is_cut,
                prompt=prompt_for(pooling, kind),
                param=param,
            )
            for kind, param in zip(("query", "document"), params, strict=True)
        }
        # Each embedded once, however many pairs it is in.
        self._texts = dict.fromkeys(("query", query) for query, _ in pairs)
        self._texts |= dict.fromkeys(("document", document) for _, document in pairs)

    def inputs(self) -> Iterator[list[int]]:
        """The token ids of what is computed. Raises InvalidRequestError and ContextLengthError."""
        if self._pooling.purpose == "score":
            return (self._pair_encoder.ids(query, document) for query, document in self._pairs)
        return (self._encoders[kind].ids(text) for kind, text in self._texts)

    def scores(self, results: Sequence[array[float]]) -> list[float]:
        """Of each pair, from the results of all inputs, in their order."""
        pooling = self._pooling
        if pooling.purpose == "score":
            return [activated(result, pooling, is_raw=self._is_raw)[0] for result in results]
        vector_of = {
            key: np.frombuffer(result, dtype=np.float32)
            for key, result in zip(self._texts, results, strict=True)
        }
        return [
            similarity(vector_of["query", query], vector_of["document", document], pooling.similarity)
            for query, document in self._pairs
        ]
