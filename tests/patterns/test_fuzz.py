"""Every built-in pattern, fuzzed over its domain and over hostile variants, and checked by the lint."""

from __future__ import annotations

import pytest
from pattern_support import ALL

from ascend_dynamo.match.fuzz import fuzz
from ascend_dynamo.match.lint import lint


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL.names)
def test_fuzz_finds_no_difference(name):
    pattern = ALL[name]
    assert fuzz(pattern, budget=len(pattern.eager) + 2, among=ALL.without(name)) == []


@pytest.mark.slow
def test_lint_has_no_complaint():
    assert lint(ALL) == []
