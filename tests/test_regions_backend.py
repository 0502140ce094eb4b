"""Regions and the real compiler: borders are kept, forced regions are enforced in strict mode, eager is unaffected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_dynamo import fuse, no_fuse
from ascend_dynamo.backend import Backend
from ascend_dynamo.regions import Region, innermost

X, Y = torch.randn(4, 8), torch.randn(4, 8)


def fired(fn: Callable[..., Tensor], **options: object) -> list[tuple[str, str]]:
    """(pattern, innermost region) of everything that fired; the result must be eager's."""
    backend = Backend({"target": "reference", **options})
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fn, backend=backend)(X, Y), fn(X, Y))
    assert not any(r.quarantined for r in backend.records)
    return [(f.pattern, innermost(f.region)) for r in backend.records for f in r.fired]


def test_inside_a_region_fusion_is_as_usual() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        with fuse("gelu_add"):
            return F.gelu(x) + y

    assert fired(fn, strict=True) == [("gelu_add", "fuse:gelu_add")]
    assert fired(lambda x, y: F.gelu(x) + y) == [("gelu_add", "")]


def test_no_pattern_fires_in_no_fuse() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        with no_fuse():
            x = F.gelu(x) + y
        return F.gelu(x) + y

    assert fired(fn) == [("gelu_add", "")]


@pytest.mark.parametrize("inner", [no_fuse, fuse])
def test_no_pattern_crosses_a_border(inner: Callable[[], Region]) -> None:
    def into(x: Tensor, y: Tensor) -> Tensor:
        with inner():
            x = F.gelu(x)
        return x + y

    def out_of(x: Tensor, y: Tensor) -> Tensor:
        x = F.gelu(x)
        with inner():
            return x + y

    def between(x: Tensor, y: Tensor) -> Tensor:
        with inner():
            x = F.gelu(x)
        with inner():
            return x + y

    assert fired(into) == fired(out_of) == fired(between) == []


@fuse("gelu_add")
def block(x: Tensor, y: Tensor) -> Tensor:
    x = F.gelu(x)
    torch._dynamo.graph_break()
    return F.gelu(x * 2) + y


def test_a_decorated_function_fuses_behind_its_graph_break() -> None:
    assert fired(block) == [("gelu_add", "fuse:gelu_add")]


def alpha(x: Tensor, y: Tensor) -> Tensor:
    with fuse("gelu_add"):
        return torch.add(F.gelu(x), y, alpha=2)


def test_a_forced_region_that_does_not_fuse_is_an_error_in_strict_mode_only() -> None:
    assert fired(alpha) == []
    with pytest.raises(Exception, match="gelu_add") as error:
        fired(alpha, strict=True)
    assert "ExpectError" in f"{error.type.__name__}: {error.value} {error.value.__cause__!r}"
