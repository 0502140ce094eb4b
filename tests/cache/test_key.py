"""Cache keys: equal for equal compilations, and every change is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ascend_dynamo.cache import key
from ascend_dynamo.contracts import CacheKey
from ascend_dynamo.options import Options

BASE: dict[str, Any] = {
    "graph": "%0 = relu",
    "inputs": [torch.ones(2, 3), 4],
    "guards": "s0 > 1",
    "options": Options(),
    "registry": "abc",
    "params": [torch.ones(3, 3)],
    "versions": {"torch": "2.13.0"},
    "device": {"cpu": "AVX2"},
    "ranks": (0, 1),
}
CHANGES: list[tuple[str, str, Any]] = [
    ("graph", "graph", "%0 = gelu"),
    ("graph", "regions", ["no_fuse"]),
    ("inputs", "inputs", [torch.ones(2, 4), 4]),
    ("inputs", "inputs", [torch.ones(2, 3).double(), 4]),
    ("inputs", "inputs", [torch.ones(3, 2).t(), 4]),
    ("inputs", "inputs", [torch.ones(2, 3), 5]),
    ("inputs", "inputs", [torch.ones(2, 3), 4.0]),
    ("inputs", "inputs", [torch.ones(2, 3, requires_grad=True), 4]),
    ("inputs", "inputs", [torch.ones(2, 3).to_sparse(), 4]),
    ("inputs", "inputs", [torch.ones(2, 3, device="meta"), 4]),
    ("guards", "guards", "s0 > 2"),
    ("options", "options", Options(level=1)),
    ("registry", "registry", "abd"),
    ("params", "params", [torch.ones(3, 3).half()]),
    ("versions", "versions", {"torch": "2.14.0"}),
    ("device", "device", {"cpu": "AVX512"}),
    ("ranks", "ranks", (1, 2)),
]


def test_equal_compilations_have_equal_keys() -> None:
    again = {**BASE, "inputs": [torch.zeros(2, 3), 4], "params": [nn.Parameter(torch.zeros(3, 3), False)]}
    old, new = key.compute(**BASE), key.compute(**again)
    assert old == new and key.combined(old) == key.combined(new)
    assert key.explain(old, new) == ()
    assert key.sentence(()) == "nothing changed"


@pytest.mark.parametrize(("component", "argument", "value"), CHANGES)
def test_every_change_changes_exactly_its_component(component: str, argument: str, value: Any) -> None:
    old, new = key.compute(**BASE), key.compute(**{**BASE, argument: value})
    assert key.explain(old, new) == (component,)
    assert key.combined(old) != key.combined(new)
    assert key.MEANING[component] in key.sentence(key.explain(old, new))


def test_every_component_is_covered_and_explained() -> None:
    names = {f.name for f in fields(CacheKey)}
    assert names == {component for component, _, _ in CHANGES} == set(key.MEANING)


def test_several_changes_are_all_named() -> None:
    old = key.compute(**BASE)
    new = key.compute(**{**BASE, "graph": "%0 = silu", "ranks": (1, 2), "options": Options(level=0)})
    assert key.explain(old, new) == ("graph", "options", "ranks")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(PLAIN, PLAIN)
def test_digests_differ_exactly_where_values_do(a: Any, b: Any) -> None:
    assert (key.digest(a) == key.digest(b)) == (repr(_ordered(a)) == repr(_ordered(b)))


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _ordered(value[k]) for k in sorted(value)}
    return [_ordered(v) for v in value] if isinstance(value, list) else value


def test_what_has_no_stable_form_is_refused() -> None:
    with pytest.raises(TypeError, match="no stable digest"):
        key.digest([object()])


def test_symbolic_sizes_are_spelled_without_a_guard() -> None:
    seen: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(key.describe(n.meta["example_value"]) for n in gm.graph.find_nodes(op="placeholder"))
        return gm.forward

    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=True)
    for size in (3, 5, 7):
        compiled(torch.ones(size, 4))
    tensors = [d for d in seen if d[0].endswith("Tensor")]
    assert len(tensors) == 1 and tensors[0][2][0].startswith("s")


def test_this_process_describes_itself() -> None:
    versions = key.installed_versions()
    assert versions["torch"] == torch.__version__ and versions["ascend-dynamo"]
    assert versions["torch-npu"] == "" or versions["torch-npu"]
    device = key.this_device()
    assert device["threads"] == torch.get_num_threads() and device["machine"]
    own = {k: v for k, v in BASE.items() if k not in ("versions", "device", "ranks")}
    assert key.compute(**own) == key.compute(**own)


def test_a_machine_without_compiler_or_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert key._compiler_version() == ""
    assert key._cpu_features("/does/not/exist") == ""
    key._cpu_features.cache_clear()


def test_an_accelerator_is_part_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    without = key.this_device()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace(get_device_name=lambda: "M9"))
    assert key.this_device()["accelerator"] == "mps:M9" and without["accelerator"] == ""


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ranks_come_from_the_process_group(group: None) -> None:
    assert key.this_rank() == (0, 1)


def test_no_process_group_is_rank_0_of_1() -> None:
    assert key.this_rank() == (0, 1)
