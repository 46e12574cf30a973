"""What decides on the host which tokens a sequence may sample next, as the step loop sees it.

Owns the protocol between the step loop and everything that constrains: grammars, lists of allowed tokens,
forbidden words. Does not know how any of them decides, nor how a mask reaches the device.
"""

from __future__ import annotations

from typing import Protocol

MASK_WORD_BITS = 32


def num_mask_words(vocab_size: int) -> int:
    """Words of a mask: bit t % 32 of word t // 32 is token t."""
    return -(-vocab_size // MASK_WORD_BITS)


class TokenConstraint(Protocol):
    """Which tokens one sequence may sample next; used from the event loop only.

    The two calls take turns: every sampled token was preceded by a `restrict`, whose answer depends only on
    the tokens accepted so far. Where the token was lost (its step failed), `restrict` is asked once more.
    """

    def restrict(self, mask: memoryview) -> None:
        """Clear the bits of the tokens that may not come next; never set one.

        mask: ceil(vocab_size / 32) int32 words, format "i", writable; bit t % 32 of word t // 32 is token t.
        """

    def accept(self, token_id: int) -> None:
        """A token was sampled. Raises ConstraintViolation for one that was not allowed."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow: the sequence ends now, with finish_reason stop."""
        ...


class ConstraintFactory(Protocol):
    """Makes a constraint at its beginning: one for each sequence of a request."""

    def __call__(self) -> TokenConstraint: ...
