"""A small language for tests of constrained rows: words from a list, one after the other, over byte tokens;
and requests that use it beside others that are free.

The constraints are real ones: they answer from the tokens accepted so far and refuse what they did not allow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphllm.engine.engine import Engine
from graphllm.errors import ConstraintViolation
from graphllm.sampling_params import SamplingParams
from graphllm.structured_outputs import StructuredOutputs
from graphllm.tokenizer.token_bytes import byte_level_alphabet
from tests.engine.harness import Collector, add, ended, running_engine

END = 256  # the tiny model's end-of-text token
_ALPHABET = sorted(byte_level_alphabet().values())
WORDS = ("ab", "acd", "b", "xyz", "xw", "q0")


def tokens(text: str) -> list[int]:
    """The tiny model's tokens of a text, one a byte."""
    return [_ALPHABET.index(byte_level_alphabet()[byte]) for byte in text.encode()]


class WordConstraint:
    """Up to `num_words` words; the end is allowed behind each of them."""

    def __init__(
        self, words: tuple[str, ...], num_words: int, *, on_restrict: Callable[[WordConstraint], None]
    ) -> None:
        self.words = tuple(tuple(tokens(word)) for word in words)
        self.num_words = num_words
        self.output: list[int] = []
        self.num_restricts = 0
        self._on_restrict = on_restrict
        self._word: tuple[int, ...] = ()
        self._num_complete = 0
        self.is_finished = False

    def allowed(self) -> set[int]:
        assert not self.is_finished, "asked behind its end"
        length = len(self._word)
        starts = {word[length] for word in self.words if word[:length] == self._word}
        return starts | ({END} if not self._word and self._num_complete else set())

    def restrict(self, mask: memoryview) -> None:
        self.num_restricts += 1
        self._on_restrict(self)
        assert mask.format == "i" and not mask.readonly
        words = [0] * len(mask)
        for token_id in self.allowed():
            words[token_id // 32] |= 1 << token_id % 32
        for index, word in enumerate(words):
            mask[index] &= word if word < 2**31 else word - 2**32

    def accept(self, token_id: int) -> None:
        if token_id not in self.allowed():
            raise ConstraintViolation(f"token {token_id} behind {self.output}")
        self.output.append(token_id)
        if token_id == END:
            self.is_finished = True
            return
        self._word += (token_id,)
        if self._word in self.words:
            self._word = ()
            self._num_complete += 1
            self.is_finished = self._num_complete == self.num_words


class LanguageCompiler:
    """`StructuredOutputs(choice=words)` means this language; keeps every constraint that it made."""

    def __init__(self, num_words: int = 6) -> None:
        self.num_words = num_words
        self.made: list[WordConstraint] = []
        self.on_restrict: Callable[[WordConstraint], None] = lambda constraint: None

    def compile(self, structured: StructuredOutputs) -> Callable[[], WordConstraint]:
        words = structured.choice
        assert words is not None

        def make() -> WordConstraint:
            made = WordConstraint(words, self.num_words, on_restrict=lambda each: self.on_restrict(each))
            self.made.append(made)
            return made

        return make

    def start(self, structured: StructuredOutputs) -> Callable[[], WordConstraint]:
        return self.compile(structured)

    def close(self) -> None:
        """Nothing was begun."""

    def install(self, engine: Engine) -> LanguageCompiler:
        engine._loaded.model.constraints._compiler = self
        return self


def is_sentence(text: str, *, words: tuple[str, ...] = WORDS, num_words: int = 6) -> bool:
    """Whether a text is one to `num_words` words."""
    rest = {text}
    for _ in range(num_words):
        rest = {each.removeprefix(word) for each in rest for word in words if each.startswith(word)}
        if "" in rest:
            return True
    return False


FREE = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
FREE_SAMPLED = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, seed=4)


def words(*choice: str, **values: Any) -> SamplingParams:
    structured = StructuredOutputs(choice=choice or WORDS)
    return SamplingParams(
        **{"temperature": 1.0, "max_tokens": 40, "seed": 9, "structured_outputs": structured, **values}
    )


WORDS_3 = words(n=3)
TRAFFIC: list[tuple[list[int], SamplingParams]] = [
    ([1, 2, 3, 4], FREE),
    ([50, 60, 70], WORDS_3),
    ([9] * 37, FREE_SAMPLED),
    ([80] * 21, words(seed=1)),
    ([7, 7], words(seed=2, temperature=0.0, logprobs=2)),
]


async def one_by_one(model: Path, traffic: list[tuple[list[int], SamplingParams]]) -> list[list[list[int]]]:
    """The undisturbed run: no look-ahead, no neighbours, memory to spare."""
    outputs = []
    async with running_engine(model, look_ahead=False) as engine:
        LanguageCompiler().install(engine)
        for index, (prompt, params) in enumerate(traffic):
            collector = add(engine, f"r{index}", prompt, params)
            await ended(collector)
            assert collector.error is None
            outputs.append(collector.token_ids)
    return outputs


def add_all(engine: Engine, traffic: list[tuple[list[int], SamplingParams]] = TRAFFIC) -> list[Collector]:
    return [add(engine, f"r{index}", prompt, params) for index, (prompt, params) in enumerate(traffic)]


def tokens_of(collectors: list[Collector]) -> list[list[list[int]]]:
    return [collector.token_ids for collector in collectors]
