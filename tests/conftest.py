"""Shared by all tests: hypothesis draws the same examples every time, and Dynamo starts each test empty."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=2000, print_blob=True)  # make soak
hypothesis.settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A seed, and no compiled code of an earlier test."""
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
