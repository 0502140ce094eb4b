"""Content keys of full pages: a hash chained over the tokens of a page and the key of the page before it.

As in vLLM's automatic prefix caching and SGLang's RadixAttention (Zheng et al. 2023): two pages have the same key iff
they hold the same tokens behind the same tokens, so equal keys mean equal keys-and-values. The digest is long enough
(128 bits, BLAKE2b) that a collision needs not be thought of; ``salt`` keeps apart what must not be shared (adapters,
tenants).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page that holds ``tokens`` and follows the page with key ``parent``."""
    return blake2b(array("q", tokens).tobytes(), key=parent, digest_size=16).digest()


def page_keys(tokens: Sequence[int], page_size: int, salt: bytes = b"", known: Sequence[bytes] = ()) -> list[bytes]:
    """The keys of all full pages of ``tokens``; the first ``len(known)`` are taken as they are."""
    keys, root = list(known), blake2b(salt, digest_size=16).digest()
    for begin in range(len(keys) * page_size, len(tokens) - page_size + 1, page_size):
        keys.append(chain(keys[-1] if keys else root, tokens[begin : begin + page_size]))
    return keys
