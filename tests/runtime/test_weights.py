"""Merging weights by aliasing: one copy, every write shows through, and nothing that is shared is touched."""

import copy

import pytest
import torch
from torch import nn

from ascend_dynamo.runtime.weights import are_adjacent, merge, refresh, why_not_mergeable


def parameters(*rows: int, columns: int = 4) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(n, columns)) for n in rows]


def test_merge_makes_slices_of_one_tensor() -> None:
    parts = parameters(3, 5, 2)
    before = [p.detach().clone() for p in parts]
    merged = merge(parts)
    assert torch.equal(merged, torch.cat(before))
    assert all(torch.equal(p, b) for p, b in zip(parts, before, strict=True))
    assert merged.untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()
    assert are_adjacent(parts) and not are_adjacent(parts[::-1])


def test_data_writes_show_through() -> None:
    parts = parameters(3, 5)
    merged = merge(parts)
    parts[1].data.mul_(2)
    with torch.no_grad():
        parts[0].add_(1)
    assert torch.equal(merged, torch.cat([p.detach() for p in parts]))


def test_merging_again_is_free() -> None:
    parts = parameters(3, 5)
    assert merge(parts).data_ptr() == merge(parts).data_ptr()
    assert why_not_mergeable(parts) == ""


def test_load_state_dict_and_state_dict_survive() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 3), "k": nn.Linear(4, 2)})
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    merged = merge([model["q"].weight, model["k"].weight])
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    model.load_state_dict({k: v + 1 for k, v in saved.items()})
    assert torch.equal(merged, torch.cat([saved["q.weight"] + 1, saved["k.weight"] + 1]))


def test_a_deep_copy_is_independent() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 3), "k": nn.Linear(4, 2)})
    merged = merge([model["q"].weight, model["k"].weight])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin["q"].weight.zero_()
    assert merged[:3].abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda a, b: [a, a], "used twice"),
        (lambda a, b: [a, nn.Parameter(b.data)], "shares its memory"),
        (lambda a, b: [a, nn.Parameter(torch.randn(8, 4)[2:5])], "view into a larger tensor"),
        (lambda a, b: [a, nn.Parameter(b.data.double())], "dtype"),
        (lambda a, b: [a, nn.Parameter(torch.randn(3, 6))], "trailing shape"),
        (lambda a, b: [a, nn.Parameter(torch.randn(4, 3).t())], "not contiguous"),
        (lambda a, b: [a, nn.Parameter(torch.randn(0, 4))], "empty"),
    ],
)
def test_refusals(make, reason) -> None:  # type: ignore[no-untyped-def]
    a, b = parameters(3, 3)
    parts = make(a, b)
    assert reason in why_not_mergeable(parts)


def test_inference_tensors_are_refused() -> None:
    with torch.inference_mode():
        parts = parameters(3, 5)
    assert "inference mode" in why_not_mergeable(parts)


def test_subclasses_are_refused() -> None:
    class Quantised(torch.Tensor):
        pass

    a, b = parameters(3, 3)
    assert "Quantised" in why_not_mergeable([a, b.data.as_subclass(Quantised)])
    assert "dense" in why_not_mergeable([a, torch.empty(3, 4, device="meta")])


def test_refresh_bumps_versions() -> None:
    model = nn.Linear(2, 2)
    before = model.weight._version
    refresh(model)
    assert model.weight._version > before
