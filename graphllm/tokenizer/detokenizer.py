"""Streaming text out of token ids: whole characters only, and nothing that a stop string may claim.

Owns the state of one sequence's text. Which bytes a token stands for is `token_bytes.py`'s; when a
sequence ends for other reasons than a stop string (end token, length) is the scheduler's.

Work and memory are linear in the text, whatever the stop strings: they are matched by one
Aho-Corasick automaton (Aho and Corasick, CACM 18(6), 1975).
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections import deque
from collections.abc import Sequence, Set

from graphllm.errors import InvalidRequestError
from graphllm.tokenizer.tokenizer import Tokenizer

MAX_STOP_CHARS = 1024
"""Most characters in the stop strings of a request together: their automaton is built on the loop."""


class StopStrings:
    """An automaton over all stop strings of a request; immutable, so sequences may share it.

    A state stands for the longest suffix of the text read so far that begins some stop string.
    """

    __slots__ = ("_first_chars", "_next", "_otherwise", "hold_length", "match_length")

    def __init__(self, stop: Sequence[str]) -> None:
        """Raises InvalidRequestError above MAX_STOP_CHARS characters."""
        if sum(map(len, stop)) > MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"The stop strings have more than {MAX_STOP_CHARS} characters together.", param="stop"
            )
        self._next: list[dict[str, int]] = [{}]
        self.match_length = [0]
        """By state: characters of the longest stop string that ends here, 0 for none."""
        self._first_chars = frozenset(text[0] for text in stop)
        depth = [0]
        for text in stop:
            state = 0
            for char in text:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self.match_length.append(0)
                    depth.append(depth[state] + 1)
                state = self._next[state][char]
            self.match_length[state] = len(text)
        self._otherwise = [0] * len(self._next)
        """By state: the longest shorter suffix that begins a stop string too."""
        self.hold_length = [0] * len(self._next)
        """By state: characters of the longest suffix that begins a stop string without completing it."""
        queue = deque(self._next[0].values())
        # Breadth first: a state's shorter suffixes are complete before it is.
        while queue:
            state = queue.popleft()
            shorter = self._otherwise[state]
            self.match_length[state] = max(self.match_length[state], self.match_length[shorter])
            self.hold_length[state] = depth[state] if self._next[state] else self.hold_length[shorter]
            for char, child in self._next[state].items():
                self._otherwise[child] = self.step(shorter, char)
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state and char not in self._next[state]:
            state = self._otherwise[state]
        return self._next[state].get(char, 0)

    def cannot_begin_in(self, text: str) -> bool:
        """Whether no stop string begins with any character of `text`."""
        return self._first_chars.isdisjoint(text)


class IncrementalDetokenizer:
    """The text of one sequence's output, as it can be shown so far.

    What `append` and `finish` return is together the text of the output tokens: their bytes read as
    UTF-8, each invalid sequence replaced by U+FFFD as soon as it is known to be invalid. It is what
    `Tokenizer.decode` adds when the output follows the prompt: a SentencePiece-like tokenizer's
    leading space is dropped only where no visible token of the prompt stands before it. Bytes of an
    unfinished character at the prompt's end belong to the prompt.

    A stop string matches at the first character that completes one; of several completed by the same
    character the longest counts. Held back is the longest suffix that is the beginning of a stop
    string, no more. With `min_tokens` a match counts only if it is completed by output token number
    `min_tokens + 1` or a later one; it may begin before.
    """

    __slots__ = (
        "_at_text_start",
        "_held",
        "_include_stop",
        "_min_tokens",
        "_num_held",
        "_partial",
        "_shown_special_token_ids",
        "_state",
        "_stop",
        "_table",
        "_text",
        "_token_bytes",
        "num_tokens",
        "stop_string",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        stop: tuple[str, ...] | StopStrings,
        skip_special_tokens: bool,
        include_stop_str_in_output: bool,
        min_tokens: int = 0,
        shown_special_token_ids: Set[int] = frozenset(),
    ) -> None:
        """shown_special_token_ids: those that are text although special tokens are skipped.

        Raises InvalidRequestError for stop strings that are too long together.
        """
        self._token_bytes = tokenizer.byte_tables
        self._table = self._token_bytes.table(skip_special_tokens=skip_special_tokens)
        table = self._table
        self._at_text_start = self._token_bytes.strips_leading_space and not any(
            table[token_id] for token_id in prompt_token_ids
        )
        self._stop: StopStrings | None = None
        if stop:
            self._stop = stop if isinstance(stop, StopStrings) else StopStrings(stop)
        self._state = 0
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._shown_special_token_ids = shown_special_token_ids
        self._partial = b""  # the beginning of a character
        self._held: deque[str] = deque()
        self._num_held = 0
        self._text: list[str] = []
        self.num_tokens = 0
        """Output tokens taken so far; the one that completed a stop string is the last."""
        self.stop_string: str | None = None
        """The stop string that matched."""

    @property
    def text(self) -> str:
        """Everything returned so far."""
        self._text = ["".join(self._text)]
        return self._text[0]

    def append(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """Take output tokens; return the text that is now safe to show and the stop string, if one matched.

        After a match the text is cut at the stop string and the remaining tokens are not taken;
        nothing may be appended any more.
        """
        assert self.stop_string is None, "append after a stop string matched"
        shown = ""
        for token_id in token_ids:
            self.num_tokens += 1
            token_bytes = self._table[token_id]
            if not token_bytes:
                if token_id not in self._shown_special_token_ids:
                    continue
                token_bytes = self._token_bytes.all[token_id]
            if self._at_text_start:
                self._at_text_start = False
                token_bytes = self._token_bytes.leading_bytes(token_id)
            if self._partial:
                token_bytes = self._partial + token_bytes
            text, num_read = utf_8_decode(token_bytes, "replace", False)
            self._partial = token_bytes[num_read:]
            if self._stop is None:
                shown += text
                continue
            shown += self._match(text, self._stop)
            if self.stop_string is not None:
                break
        if shown:
            self._text.append(shown)
        return shown, self.stop_string

    def finish(self) -> str:
        """What was held back, for a sequence that ended otherwise than by a stop string."""
        if self.stop_string is not None:
            return ""
        tail, _ = utf_8_decode(self._partial, "replace", True)
        self._partial = b""
        shown = self._release(0) + tail
        self._text.append(shown)
        return shown

    def _match(self, text: str, stop: StopStrings) -> str:
        """Run new text through the automaton; return what can be shown, and note a match."""
        if self._state == 0 and stop.cannot_begin_in(text):
            return text  # nothing is held in state 0
        state = self._state
        may_match = self.num_tokens > self._min_tokens
        for position, char in enumerate(text):
            state = stop.step(state, char)
            if may_match and (match_length := stop.match_length[state]):
                return self._cut(text[: position + 1], match_length)
        self._state = state
        self._hold(text)
        return self._release(stop.hold_length[state])

    def _cut(self, text: str, match_length: int) -> str:
        """Text ends with a stop string: note it, and return what stands before it (or with it)."""
        self._hold(text)
        before = self._release(match_length)
        self.stop_string = self._release(0)
        return before + self.stop_string if self._include_stop else before

    def _hold(self, text: str) -> None:
        if text:
            self._held.append(text)
            self._num_held += len(text)

    def _release(self, num_kept: int) -> str:
        """Take all held text but the last `num_kept` characters."""
        pieces = []
        while self._num_held > num_kept:
            piece = self._held.popleft()
            num_over = self._num_held - num_kept
            if len(piece) > num_over:
                self._held.appendleft(piece[num_over:])
                piece = piece[:num_over]
            pieces.append(piece)
            self._num_held -= len(piece)
        return "".join(pieces)
