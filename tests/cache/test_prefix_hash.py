"""A block's hash names its content: the tokens up to its end, and whatever else its KV depends on."""

from __future__ import annotations

import hashlib

import pytest

from graphllm.cache.prefix_hash import PrefixHasher

TOKENS = list(range(100, 140))


def hashes_of(
    hasher: PrefixHasher, tokens: list[int], *, num_blocks: int, salt: str | None = None
) -> list[bytes]:
    hashes: list[bytes] = []
    hasher.extend(hashes, tokens, num_blocks=num_blocks, cache_salt=salt)
    return hashes


def test_hash_is_a_sha_256_chain_over_token_bytes() -> None:
    hasher = PrefixHasher(4, secret=b"secret")
    first, second = hashes_of(hasher, TOKENS, num_blocks=2)
    content = b"".join(token.to_bytes(4, "little") for token in TOKENS)
    assert first == hashlib.sha256(hasher.root(None) + content[:16]).digest()
    assert second == hashlib.sha256(first + content[16:32]).digest()


def test_chain_goes_on_where_it_was_left() -> None:
    hasher = PrefixHasher(4)
    hashes = hashes_of(hasher, TOKENS, num_blocks=3)
    hasher.extend(hashes, TOKENS, num_blocks=10, cache_salt=None)
    assert hashes == hashes_of(hasher, TOKENS, num_blocks=10)
    assert len(set(hashes)) == 10


def test_same_block_behind_another_prefix_has_another_hash() -> None:
    hasher = PrefixHasher(4)
    other = [1, *TOKENS[1:]]
    pairs = zip(
        hashes_of(hasher, TOKENS, num_blocks=10), hashes_of(hasher, other, num_blocks=10), strict=True
    )
    assert all(ours != theirs for ours, theirs in pairs)


def test_only_full_blocks_have_a_hash() -> None:
    with pytest.raises(AssertionError, match="full blocks"):
        hashes_of(PrefixHasher(16), TOKENS, num_blocks=3)


def test_salt_fingerprint_and_secret_separate_contents() -> None:
    hashers = [
        PrefixHasher(4, secret=b"a", fingerprint=b"bc"),
        PrefixHasher(4, secret=b"ab", fingerprint=b"c"),
        PrefixHasher(4, secret=b"a", fingerprint=b"b"),
        PrefixHasher(4, secret=b"a"),
    ]
    salts = [None, "", "\0", "x", "\udc80"]
    roots = {hasher.root(salt) for hasher in hashers for salt in salts}
    assert len(roots) == len(hashers) * len(salts)


def test_every_process_has_its_own_secret() -> None:
    assert PrefixHasher(4).root(None) != PrefixHasher(4).root(None)
