"""Random walks through a constraint, as a model without an opinion would take them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from graphllm.constraint import TokenConstraint, num_mask_words
from graphllm.tokenizer.tokenizer import Tokenizer

# What usually brings a text to its end, the best first.
CLOSERS = (b'"', b"}", b"]", b"0", b"1", b",", b":", b".", b"-", b"T", b"Z", b"@", b"x", b"a", b"\\")


@dataclass(slots=True)
class Walk:
    """One sequence under a constraint."""

    constraint: TokenConstraint
    tokenizer: Tokenizer
    vocab_size: int
    end_token_ids: frozenset[int]
    draw: random.Random
    token_ids: list[int] = field(default_factory=list)
    is_over: bool = False

    def allowed(self) -> npt.NDArray[np.int64]:
        """Ids of the tokens that may come next, in order."""
        row = np.full(num_mask_words(self.vocab_size), -1, np.int32)
        self.constraint.restrict(memoryview(row))
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")[: self.vocab_size]
        return np.flatnonzero(bits)

    def take(self, token_id: int) -> None:
        self.constraint.accept(token_id)
        if token_id in self.end_token_ids:
            self.is_over = True
            return
        self.token_ids.append(token_id)
        self.is_over = self.constraint.is_finished

    def step(self, *, is_long: bool = False) -> None:
        """A token at random; `is_long` keeps away from whatever may end the text."""
        allowed = self.allowed().tolist()
        assert allowed, f"no way on from {self.output!r}"
        if is_long:
            staying = [
                i
                for i in allowed
                if i not in self.end_token_ids
                and not self.tokenizer.token_bytes(i).endswith((b'"', b"}", b"]"))
            ]
            allowed = staying or allowed
        self.take(self.draw.choice(allowed))

    def run(self, max_steps: int, *, is_long: bool = False) -> None:
        for _ in range(max_steps):
            if self.is_over:
                return
            self.step(is_long=is_long)

    def complete(self, max_steps: int = 600) -> None:
        """Bring the text to an end; fails where there is no end to be found."""
        for _ in range(max_steps):
            if self.is_over:
                return
            allowed = self.allowed().tolist()
            assert allowed, f"no way on from {self.output!r}"
            ends = [i for i in allowed if i in self.end_token_ids]
            if ends:
                self.take(ends[0])
                continue
            by_bytes = {self.tokenizer.token_bytes(i): i for i in allowed}
            known = [by_bytes[closer] for closer in CLOSERS if closer in by_bytes]
            if b'"' in by_bytes:
                known = known[:1]
            # Now and then something else: not every text can be closed with these.
            is_closing = known and self.draw.random() < 0.8
            self.take(self.draw.choice(known if is_closing else allowed))
        raise AssertionError(f"not finished after {max_steps} tokens: {self.output!r}")

    @property
    def output(self) -> bytes:
        return b"".join(self.tokenizer.token_bytes(i) for i in self.token_ids)
