"""What wraps private torch keeps its promises."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.errors import UnsupportedTorchError


def test_retrace_tells_arguments_apart_that_share_one_fake_value() -> None:
    """Two equal layers have equal merged weights, whose fake values are cached: once they became one input."""
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output((graph.call_function(torch.ops.aten.sub.Tensor, (a, b)),))
    with torch._subclasses.FakeTensorMode():
        shared = torch.empty(2, 3)
    a.meta["val"] = b.meta["val"] = shared
    again = compat.retrace(fx.GraphModule({}, graph), fx.Interpreter, [shared, shared], {})
    (result,) = again(torch.full((2, 3), 5.0), torch.full((2, 3), 3.0))
    assert torch.equal(result, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117"])
def test_a_torch_that_is_too_old_is_refused_with_what_to_do(version: str) -> None:
    with pytest.raises(UnsupportedTorchError, match=r"found .*pip install 'torch==2\.13\.0'"):
        compat.check_torch_version(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.0a0+git1", "3.0.0"])
def test_a_torch_of_the_range_or_newer_is_accepted(version: str) -> None:
    compat.check_torch_version(version)
