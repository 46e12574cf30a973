"""How much work the JSON of a body is, told before it is decoded.

Owns the cap on a body's values. Decoding is one call that nothing can interrupt, and its time goes by values
and not by bytes: a text of 32 MB takes milliseconds, as many bytes of empty objects take seconds. What is in
the values, and how many a field may have, is for those who read them.
"""

from __future__ import annotations

from graphllm.errors import PayloadTooLargeError

# In the time that decoding a number takes, about 30 ns. An object is a struct or a dict with its keys.
MAX_WORK = 1_000_000
_OBJECT_WORK, _ARRAY_WORK = 30, 5
# Bodies below this cannot reach MAX_WORK, or by so little that it does not matter.
_MIN_BYTES = 128 * 1024
_SLICE_BYTES = 1024**2
_BEGINNING_BYTES = 3 * 1024**2
# Strings that are taken out of a body to see what is left, each in less than a tenth of a microsecond.
_MAX_STRINGS = 200_000


def check_work(body: bytes) -> None:
    """Raises PayloadTooLargeError for a body that would keep the event loop for long.

    Two steps, so that a long text full of commas and braces is not refused: where the body's bytes as they
    are say too much, its strings are taken out first.
    """
    if len(body) < _MIN_BYTES or not _is_too_much(body):
        return
    # A dense body has too much in its beginning already, which is sooner looked at than all of it.
    if any(_is_too_much(_without_strings(part)) for part in (body[:_BEGINNING_BYTES], body)):
        raise PayloadTooLargeError(
            "The request body has too many JSON values to be read while other requests are served (about "
            f"{MAX_WORK // _OBJECT_WORK} objects or {MAX_WORK} numbers are allowed); split the request."
        )


def _without_strings(body: bytes) -> bytes:
    """What stands between strings, of the first _MAX_STRINGS, and everything behind those."""
    pieces = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"', 2 * _MAX_STRINGS)
    return b"".join(pieces[::2])


def _is_too_much(text: bytes) -> bool:
    work = 0
    for start in range(0, len(text), _SLICE_BYTES):
        end = start + _SLICE_BYTES
        work += text.count(b",", start, end)
        work += _OBJECT_WORK * text.count(b"{", start, end) + _ARRAY_WORK * text.count(b"[", start, end)
        if work > MAX_WORK:
            return True
    return False
