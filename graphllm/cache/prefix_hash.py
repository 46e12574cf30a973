"""What a full KV block is called: a chained hash over everything that its content depends on.

Owns the hash and its seed, nothing else: which block has which content is the block manager's to know.

h_i = SHA-256(h_{i-1} || tokens of block i as uint32), and h_{-1} is a SHA-256 over a secret of this
process, what else changes KV (model, dtype), and the request's salt and adapter. Equal hashes mean equal
prefixes, and nobody outside can find a collision or guess which salt a prompt was cached under.

Each group of layers keeps a prefix's last tokens in a block of its own; `content_key` tells these apart.
"""

from __future__ import annotations

import hashlib
import os
from array import array

_TOKEN_TYPE = "I"


def content_key(content_hash: bytes, group: int) -> bytes:
    """What the block of one group is called whose column of tokens has this hash."""
    return content_hash + bytes((group,)) if group else content_hash


class PrefixHasher:
    """Hashes token prefixes in blocks of `block_size` tokens.

    `fingerprint` names whatever changes KV beside tokens; `secret` is random unless a test gives one.
    """

    __slots__ = ("_seed", "block_size")

    def __init__(self, block_size: int, *, fingerprint: bytes = b"", secret: bytes | None = None) -> None:
        self.block_size = block_size
        secret = os.urandom(32) if secret is None else secret
        self._seed = _framed(secret) + _framed(fingerprint)

    def root(self, cache_salt: str | None, *, adapter_load: int = 0) -> bytes:
        """The hash before the first block. No salt differs from every salt, the empty one too.

        adapter_load: which load of an adapter changes the model, 0 for none.
        """
        salt = b"\0" if cache_salt is None else b"\1" + cache_salt.encode("utf-8", "surrogatepass")
        adapter = adapter_load.to_bytes(8, "little") if adapter_load else b""
        return hashlib.sha256(self._seed + _framed(salt) + _framed(adapter)).digest()

    def extend(
        self,
        hashes: list[bytes],
        token_ids: list[int],
        *,
        num_blocks: int,
        cache_salt: str | None,
        adapter_load: int = 0,
    ) -> None:
        """Append to `hashes`, those of the first full blocks of `token_ids`, until it has `num_blocks`."""
        first = len(hashes)
        if num_blocks <= first:
            return
        block_size = self.block_size
        assert num_blocks * block_size <= len(token_ids), "only full blocks have a hash"
        tokens = array(_TOKEN_TYPE, token_ids[first * block_size : num_blocks * block_size])
        content = tokens.tobytes()
        num_bytes = tokens.itemsize * block_size
        parent = hashes[-1] if hashes else self.root(cache_salt, adapter_load=adapter_load)
        for start in range(0, len(content), num_bytes):
            parent = hashlib.sha256(parent + content[start : start + num_bytes]).digest()
            hashes.append(parent)


def _framed(value: bytes) -> bytes:
    """With its length before it, so that no two different lists of values give the same bytes."""
    return len(value).to_bytes(8, "little") + value
