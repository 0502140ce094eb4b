"""Regions survive Dynamo, inlining, recursion, generators, graph breaks and AOTAutograd."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from functorch.compile import make_boxed_func
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from ascend_dynamo import regions
from ascend_dynamo.regions import forced, fuse, innermost, no_fuse

X = torch.linspace(-2, 2, 16).reshape(4, 4)


class Recorder:
    """A backend that marks, captures, and keeps (op, region) of every call of every graph."""

    def __init__(self) -> None:
        self.graphs: list[list[tuple[str, str]]] = []
        self.entered: list[int] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.entered.append(regions.mark(gm))

        def compiler(graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
            calls = [n for n in graph.graph.nodes if n.op == "call_function"]
            self.graphs.append(
                [(n.target.__name__.split(".")[0], n.meta.get("custom", {}).get(regions.KEY, "")) for n in calls]
            )
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions={})(gm, inputs)

    def sites(self) -> dict[str, list[str]]:
        """op -> the regions of its calls, over all graphs."""
        table: dict[str, list[str]] = {}
        for graph in self.graphs:
            for op, region in graph:
                table.setdefault(op, []).append(region)
        return table

    def innermost(self) -> dict[str, list[str]]:
        return {op: [innermost(r) for r in found] for op, found in self.sites().items()}


def run(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Recorder:
    """Compile and call ``fn`` under no_grad; it must agree with eager and leave no region behind."""
    recorder = Recorder()
    with torch.no_grad():
        expected = fn(*args)
        torch.testing.assert_close(torch.compile(fn, backend=recorder, **kwargs)(*args), expected)
    assert regions.active() == ""
    return recorder


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_with_block_marks_exactly_its_nodes(dynamic: bool | None) -> None:
    def fn(x: Tensor) -> Tensor:
        x = x.sin()
        with fuse("gelu", "swiglu"):
            x = x.relu() + 1
        return x.tanh()

    found = run(fn, X, fullgraph=True, dynamic=dynamic).innermost()
    assert found == {"sin": [""], "relu": ["fuse:gelu,swiglu"], "add": ["fuse:gelu,swiglu"], "tanh": [""]}


def test_nested_regions_are_joined_and_the_innermost_decides() -> None:
    def fn(x: Tensor) -> Tensor:
        with fuse("a"):
            x = x.sin()
            with no_fuse():
                x = x.cos()
                with fuse("b"):
                    x = x.tanh()
            x = x.relu()
        return x

    recorder = run(fn, X, fullgraph=True)
    assert recorder.innermost() == {"sin": ["fuse:a"], "cos": ["no_fuse"], "tanh": ["fuse:b"], "relu": ["fuse:a"]}
    sites = recorder.sites()
    assert sites["sin"] == sites["relu"]  # the same region, on both sides of the inner one
    assert [part.partition("@")[0] for part in sites["tanh"][0].split("/")] == ["fuse:a", "no_fuse", "fuse:b"]
    assert recorder.entered == [3]


def test_siblings_and_loop_passes_never_merge() -> None:
    def fn(x: Tensor) -> Tensor:
        with fuse("a"):
            x = x.sin()
        with fuse("a"):
            x = x.cos()
        for _ in range(3):
            with fuse("a"):
                x = x.relu()
        return x

    sites = [r for found in run(fn, X, fullgraph=True).sites().values() for r in found]
    assert len(sites) == len(set(sites)) == 5
    assert {innermost(r) for r in sites} == {"fuse:a"}
    assert all("@test_regions.py:" in r for r in sites)


@no_fuse()
def countdown(x: Tensor, n: int = 2) -> Tensor:
    """Recursive and decorated."""
    return x.relu() if n == 0 else countdown(x.sin(), n - 1)


def test_decorator_inlines_and_recurses() -> None:
    found = run(lambda x: countdown(x).cos(), X, fullgraph=True).innermost()
    assert found == {"sin": ["no_fuse"] * 2, "relu": ["no_fuse"], "cos": [""]}
    assert countdown.__name__ == "countdown" and countdown.__doc__ == "Recursive and decorated."


def test_decorated_method() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        @fuse("mlp")
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).relu()

    found = run(Block(), X, fullgraph=True).innermost()
    assert {r for regions_of_op in found.values() for r in regions_of_op} == {"fuse:mlp"}


@fuse("a")
def broken(x: Tensor) -> Tensor:
    x = x.sin()
    torch._dynamo.graph_break()
    return x.cos()


def test_decorator_covers_both_sides_of_a_graph_break() -> None:
    recorder = run(lambda x: broken(x).relu(), X)
    assert recorder.innermost() == {"sin": ["fuse:a"], "cos": ["fuse:a"], "relu": [""]}
    assert len(recorder.graphs) == 3


def break_inside(x: Tensor) -> Tensor:
    x = x.sin()
    torch._dynamo.graph_break()
    return x.cos()


def test_with_block_around_a_call_that_breaks_the_graph() -> None:
    def fn(x: Tensor) -> Tensor:
        with fuse("a"):
            with no_fuse():
                x = break_inside(x)
            return break_inside(x)

    recorder = run(fn, X)
    # The callee is compiled where it is first called; both of its frames are inside.
    assert recorder.innermost()["sin"][0] == "no_fuse" and recorder.innermost()["cos"][0] == "no_fuse"


def test_graph_break_directly_in_a_with_block_is_still_right() -> None:
    def fn(x: Tensor) -> Tensor:
        with fuse("a"):
            x = x.sin()
            torch._dynamo.graph_break()
            x = x.cos()
        return x.relu()

    run(fn, X)


def test_exception_leaves_the_region() -> None:
    def fn(x: Tensor) -> Tensor:
        try:
            with no_fuse():
                x = x.sin()
                raise ValueError("out")
        except ValueError:
            return x.cos()

    assert run(fn, X, fullgraph=True).innermost() == {"sin": ["no_fuse"], "cos": [""]}


@fuse("g")
def produce(x: Tensor, n: int) -> Generator[Tensor, None, str]:
    for _ in range(n):
        x = x.sin()
        yield x
    return "done"


def test_generator_is_in_its_region_only_while_it_runs() -> None:
    def fn(x: Tensor) -> Tensor:
        total = x
        for y in produce(x, 2):
            total = total * y.relu()
        return total

    found = run(fn, X, fullgraph=True).innermost()
    assert found == {"sin": ["fuse:g"] * 2, "relu": [""] * 2, "mul": [""] * 2}


def test_generator_returns_receives_and_is_suspended_outside() -> None:
    @no_fuse()
    def echo() -> Generator[Any, Any, int]:
        got = yield regions.active()
        yield got
        return 7

    it = echo()
    assert next(it) == "no_fuse" and regions.active() == ""
    assert it.send("sent") == "sent"
    with pytest.raises(StopIteration) as stop:
        next(it)
    assert stop.value.value == 7


def test_bodies_of_control_flow_and_checkpoints() -> None:
    def fn(x: Tensor) -> Tensor:
        with no_fuse():
            x = torch.utils.checkpoint.checkpoint(lambda t: t.sin().cos(), x, use_reentrant=False)
        return x.relu()

    assert run(fn, X, fullgraph=True).innermost() == {"sin": ["no_fuse"], "cos": ["no_fuse"], "relu": [""]}

    def branch(x: Tensor) -> Tensor:
        with fuse("c"):
            return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))

    seen: list[str] = []

    def look(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        regions.mark(gm)
        bodies = [m for m in gm.children() if isinstance(m, fx.GraphModule)]
        seen.extend(n.meta["custom"][regions.KEY] for b in bodies for n in b.graph.nodes if n.op == "call_method")
        return gm.forward

    torch.compile(branch, backend=look, fullgraph=True)(X)
    assert [innermost(r) for r in seen] == ["fuse:c", "fuse:c"]


def test_gradients_are_untouched() -> None:
    @fuse("a")
    def fn(x: Tensor) -> Tensor:
        return (x.sin() * x).sum()

    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    fn(x).backward()
    torch.compile(fn, backend=Recorder(), fullgraph=True)(y).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_other_backends_are_not_disturbed() -> None:
    def fn(x: Tensor) -> Tensor:
        with fuse("a"):
            x = x.sin()
        return x + 1

    torch.testing.assert_close(torch.compile(fn, backend="aot_eager", fullgraph=True)(X), fn(X))
    assert regions.active() == ""
    exported = torch.export.export(fx_module(fn), (X,))
    torch.testing.assert_close(exported.module()(X), fn(X))


def fx_module(fn: Callable[[Tensor], Tensor]) -> nn.Module:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fn(x)

    return Wrapped()


def test_eager_state_nests_and_unwinds() -> None:
    with fuse("a"):
        assert regions.active() == "fuse:a"
        with pytest.raises(RuntimeError), no_fuse():
            assert regions.active() == "fuse:a/no_fuse"
            raise RuntimeError
        assert regions.active() == "fuse:a"
    assert regions.active() == ""


@pytest.mark.parametrize("bad", ["", "a/b", "a,b", "a b", "a@b"])
def test_names_that_cannot_be_patterns_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a pattern"):
        fuse("fine", bad)


def test_only_functions_are_decorated() -> None:
    async def later() -> None: ...

    for wrong in (later, nn.ReLU(), nn.ReLU):
        with pytest.raises(TypeError, match="a region decorates functions"):
            no_fuse()(wrong)
    with pytest.raises(TypeError, match=r"decorate with @fuse\(\.\.\.\)"):
        fuse(run)  # type: ignore[arg-type]


LABELS = st.one_of(st.just("no_fuse"), st.lists(st.sampled_from(["a", "b_c", "d.e"]), max_size=3).map(tuple))


@given(st.lists(LABELS, max_size=4))
def test_innermost_and_forced_read_what_mark_writes(labels: list[str | tuple[str, ...]]) -> None:
    parts = [label if isinstance(label, str) else fuse(*label).label for label in labels]
    region = "/".join(f"{part}@file.py:{i}#{i}" for i, part in enumerate(parts))
    assert innermost(region) == (parts[-1] if parts else "")
    assert forced(region) == (labels[-1] if labels and isinstance(labels[-1], tuple) else ())
