"""One graph for all sizes of a growing cache: its keys and values have a symbol each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ascend_dynamo.backend import Backend


def step(q, k, v, past_k, past_v):
    return F.scaled_dot_product_attention(q, torch.cat((past_k, k), -2), torch.cat((past_v, v), -2))


def arguments(length):
    new = (torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
    return *new, torch.randn(2, 4, length, 8), torch.randn(2, 4, length, 8)


def compiled(step):
    backend = Backend({"target": "reference", "strict": True, "validate": True}, texts=True)
    return torch.compile(step, backend=backend), backend


def test_separate_symbols_of_keys_and_values_are_one_count():
    run, backend = compiled(step)
    with torch.no_grad():
        for length in (5, 6, 23):
            args = arguments(length)
            torch.testing.assert_close(run(*args), step(*args))
    _, record = backend.records  # the first length, and all others
    assert "s0 + 1" in record.before and "s1 + 1" in record.before
    assert record.count("flash_attention") == 1 and not record.quarantined


def test_counts_known_to_differ_are_refused():
    def shifted(q, k, v, past_k, past_v):
        return F.scaled_dot_product_attention(q, torch.cat((past_k, k), -2), torch.cat((past_k, k, v), -2))

    run, backend = compiled(shifted)
    with torch.no_grad():
        run(*arguments(5))
    (record,) = backend.records
    assert record.count("flash_attention") == 0 and not record.quarantined
