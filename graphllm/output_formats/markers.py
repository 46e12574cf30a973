"""Finding marker texts in a stream: where one stands, and where one may just be beginning.

Owns the search. What a marker means is the parser's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

BLANKS = " \t\r\n"
_BLANK_RUN = re.compile(r"[ \t\r\n]*")


class Markers:
    """A set of literal texts to look for; immutable, so that all parsers of a format share it.

    Where one marker begins another ("```" and "```json"), the longer one is meant if it comes; none may
    stand inside another. Time is linear in the text, times the length of the longest marker at worst.
    """

    __slots__ = ("_any_first", "_expression", "_prefixes", "_reach", "texts")

    def __init__(self, texts: Iterable[str]) -> None:
        """`texts` are not empty; of two that are equal one counts."""
        self.texts = tuple(sorted({text for text in texts if text}, key=lambda text: (-len(text), text)))
        # Longest first: an alternation takes the first that fits.
        self._expression = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        firsts = "".join(sorted({re.escape(text[0]) for text in self.texts}))
        self._any_first = re.compile(f"[{firsts}]" if firsts else r"(?!)")
        self._prefixes = frozenset(text[:length] for text in self.texts for length in range(1, len(text)))
        self._reach = max(map(len, self.texts), default=1) - 1

    def cannot_begin_in(self, text: str) -> bool:
        """Whether no marker begins with any character of `text`."""
        return self._any_first.search(text) is None

    def search(self, text: str, position: int, *, is_last: bool) -> tuple[int, str]:
        """Where the next marker from `position` on begins, and which it is.

        "" as the marker says that there is none before the place given, and that from there on one may
        be beginning; the place is the end of the text where nothing is. With `is_last` nothing comes
        after `text`.
        """
        found = self._expression.search(text, position)
        if found is not None:
            start = found.start()
            may_grow = not is_last and len(text) - start <= self._reach and text[start:] in self._prefixes
            return start, "" if may_grow else found.group()
        return (len(text) if is_last else self._possible_start(text, position)), ""

    def at(self, text: str, position: int, *, is_last: bool) -> str | None:
        """The marker that begins at `position`, "" where that is not known yet, None where none does."""
        found = self._expression.match(text, position)
        if not is_last and len(text) - position <= self._reach and text[position:] in self._prefixes:
            return ""
        return None if found is None else found.group()

    def _possible_start(self, text: str, position: int) -> int:
        """Where the longest end of `text` begins that a marker may begin with; its length where none."""
        start = max(position, len(text) - self._reach)
        while True:
            first = self._any_first.search(text, start)
            if first is None:
                return len(text)
            start = first.start()
            if text[start:] in self._prefixes:
                return start
            start += 1


@lru_cache(maxsize=256)
def markers(*texts: str) -> Markers:
    """The one `Markers` of these texts."""
    return Markers(texts)


def end_of_blanks(text: str, position: int) -> int:
    """The place of the first character from `position` on that is no blank."""
    found = _BLANK_RUN.match(text, position)
    assert found is not None
    return found.end()
