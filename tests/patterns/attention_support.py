"""Shared by the tests of the attention recogniser: operands, and the names of its patterns."""

from __future__ import annotations

import torch

ATTENTION = ("sdpa", "eager_attention")


def qkv(dtype=torch.float32, hq=4, hk=4, sq=5, sk=7, d=8, dv=8):
    """q [2, hq, sq, d], k [2, hk, sk, d], v [2, hk, sk, dv]."""
    q, k = torch.randn(2, hq, sq, d, dtype=dtype), torch.randn(2, hk, sk, d, dtype=dtype)
    return q, k, torch.randn(2, hk, sk, dv, dtype=dtype)


def hidden(empty=True, heads=1):
    """[2, heads, 5, 7], True where a key is hidden; one row of the first batch sees nothing if ``empty``."""
    hide = torch.rand(2, heads, 5, 7) < 0.4
    hide[..., 0] = False
    hide[0, :, 2] = empty
    return hide
