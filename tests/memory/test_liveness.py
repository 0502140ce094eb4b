"""Liveness: hand-made graphs with known lifetimes, and random programs against an execution that is weighed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_support import Measured, allocated_peak, sweep, traced
from torch import nn

import ascend_dynamo
from ascend_dynamo.errors import MemoryPlanError
from ascend_dynamo.memory import Buffer, Lifetime, Liveness, lifetimes_of, liveness, plan_at, shared_arena
from ascend_dynamo.memory.lifetimes import peak_of
from ascend_dynamo.memory.views import is_dense, viewable

KB = 256  # float32 elements


def lives(fn: Callable[..., Any], *args: Any) -> dict[str, tuple[int, int, int, bool]]:
    """(start, end, bytes, output) by the operator's name."""
    found = liveness(traced(fn, *args)).lifetimes
    return {x.id: (x.start, x.end, x.bytes, x.output) for x in found}


def test_a_chain_frees_each_value_after_its_last_use():
    found = lives(lambda x: x.sin().cos().exp(), torch.randn(KB))
    assert found == {"sin": (0, 2, 1024, False), "cos": (1, 3, 1024, False), "exp": (2, 3, 1024, True)}


def test_a_view_keeps_its_root_alive_and_owns_nothing():
    def f(x):
        a = x.sin()
        tail = a[16:]
        b = x.cos()
        return b.sum() + tail.view(-1).sum()

    found = lives(f, torch.randn(KB))
    assert found["sin"] == (0, 4, 1024, False)  # sin, cos, sum of b, sum of the tail
    assert not any(name.startswith(("slice", "view")) for name in found)


def test_a_write_through_a_view_touches_the_root():
    def f(x):
        a = x.sin()
        b = x.cos()
        a[:4].add_(1)
        return b + 1

    found = lives(f, torch.randn(KB))
    assert found["sin"][:2] == (0, 3) and found["cos"][:2] == (1, 4)
    assert not any(name.startswith("add_") for name in found)


def test_inputs_constants_and_what_is_written_into_them_are_no_activations():
    constant = torch.randn(KB)

    def f(x, cache):
        cache.copy_(x.sin())
        return (cache + constant).sum()

    found = lives(f, torch.randn(KB), torch.zeros(KB))
    assert set(found) == {"sin", "add", "sum_1"} and found["sin"][:2] == (0, 2)


def test_results_of_one_operator_are_allocations_of_their_own():
    def f(x):
        values, indices = x.topk(8)
        return indices + 1, values.sum()

    found = lives(f, torch.randn(KB))
    assert found["topk[0]"][2:] == (32, False) and found["topk[1]"][2:] == (64, False)
    assert found["topk[1]"][:2] == (0, 2) and found["topk[0]"][:2] == (0, 3)


def test_a_result_that_nobody_takes_is_gone_with_its_siblings_tuple():
    found = lives(lambda x: torch.native_layer_norm(x, [16], None, None, 1e-5)[0] * 2 + 1, torch.randn(8, 16))
    assert found["native_layer_norm[0]"][:2] == (0, 2)
    assert found["native_layer_norm[1]"][:2] == found["native_layer_norm[2]"][:2] == (0, 1)


def test_slices_of_one_tensor_share_it():
    def f(x):
        a, b = x.exp().split(KB // 2)
        return a.sum(), b.sin().sum()

    found = lives(f, torch.randn(KB))
    assert found["exp"][:2] == (0, 3) and "split" not in found


def test_an_output_that_is_a_view_makes_its_root_escape():
    found = liveness(traced(lambda x: (x.sin().view(4, -1)[0], x.cos().sum()), torch.randn(KB)))
    by = {x.id: x for x in found.lifetimes}
    assert by["sin"].output and by["sin"].end == found.steps
    assert not by["cos"].output and by["sum_1"].output
    assert [b.id for b in found.buffers()] == ["cos"]
    assert found.peak(arena=True).bytes == 1024 and found.peak().bytes == 2048 + 4


def test_an_input_that_is_returned_is_still_no_activation():
    assert lives(lambda x: (x, x.view(2, -1), x + 1), torch.randn(KB)) == {"add": (0, 1, 1024, True)}


def test_a_reshape_counts_as_a_copy_only_where_it_is_one():
    gm = traced(lambda x: x.sin(), torch.randn(4, 8))
    graph, (sin,) = gm.graph, gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)

    def append(target, value, *args):
        with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
            node = graph.call_function(target, args)
        node.meta["val"] = value
        return node

    fake = sin.meta["val"]
    same = append(torch.ops.aten.reshape.default, fake.reshape(32), sin, [32])
    turned = append(torch.ops.aten.permute.default, fake.permute(1, 0), sin, [1, 0])
    copied = append(torch.ops.aten.reshape.default, fake.permute(1, 0).reshape(32), turned, [32])
    names = {x.id for x in liveness(gm).lifetimes}
    assert copied.name in names and same.name not in names and turned.name not in names


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_viewable_is_what_torch_can_view(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    x = torch.empty(sizes).permute(data.draw(st.permutations(range(len(sizes)))))
    if data.draw(st.booleans()):
        x = x[..., ::2]
    if data.draw(st.booleans()):
        x = x.unsqueeze(-1).expand(*x.shape, 3)
    assert is_dense(list(x.shape), list(x.stride())) == x.is_contiguous()
    left, shape = x.numel(), []
    while left > 1:
        factor = data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
        shape.append(factor)
        left //= factor
    try:
        x.view(shape)
        possible = True
    except RuntimeError:
        possible = False
    assert viewable(list(x.shape), list(x.stride()), shape) == possible


def test_symbolic_sizes_are_expressions_with_bounds():
    gm = traced(lambda x: (x @ x.T).softmax(-1).sum(), torch.randn(6, 16), symbolic=True)
    found = liveness(gm)
    (symbol,) = [s for s in found.symbols if s.hint == 6]
    square = next(x for x in found.lifetimes if x.id.startswith("mm"))
    assert str(square.bytes) == f"4*{symbol.name}**2"
    assert found.peak().bytes == 2 * 4 * 36  # softmax reads one square and writes another
    assert found.peak({symbol.name: 100}).bytes == 2 * 4 * 100**2
    assert [b.size for b in lifetimes_of(gm, {symbol.name: 10})] == [400, 400]
    with pytest.raises(ValueError, match="has no bound"):
        found.upper()
    assert found.upper({s.name: 16 for s in found.symbols}).peak().bytes == 2 * 4 * 256
    with pytest.raises(ValueError, match="no symbolic size"):
        found.at({"batch": 4})


def test_gears_share_an_arena_as_large_as_the_largest():
    found = liveness(traced(lambda x: (x @ x.T).softmax(-1).sum(), torch.randn(6, 16), symbolic=True))
    (name,) = [s.name for s in found.symbols if s.hint == 6]
    size, plans = shared_arena(found, [{name: 4}, {name: 128}, {name: 30}])
    assert [p.lower_bound for p in plans] == [2 * 4 * n * n for n in (4, 128, 30)]
    assert size == plans[1].size == plan_at(found, {name: 128}).size
    for p in plans:
        p.check()
    with pytest.raises(MemoryPlanError, match="no gears"):
        shared_arena(found, [])


def test_sizes_are_read_from_the_inputs_of_a_call():
    found = liveness(traced(lambda x, y: x.sin().sum() + y.cos().sum(), torch.randn(6), torch.randn(9), symbolic=True))
    sizes = found.sizes_of([torch.randn(50), torch.randn(70)])
    assert sorted(sizes.values()) == [50, 70] and found.peak(sizes).bytes >= 280


def test_a_record_has_the_bound_that_dynamo_was_told():
    backend = ascend_dynamo.Backend({"target": "reference", "strict": True})
    x = torch.randn(8, 4)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    torch.compile(lambda x: x.sin().cos().sum(), backend=backend)(x)
    record = backend.records[0].memory
    assert record is not None and record.source == "fx" and record.exact
    assert record.arena == record.lower_bound == 2 * 8 * 4 * 4 and record.steps == 3
    assert all(block.formula for block in record.blocks if not block.output)
    ((name, value),) = record.sizes.items()
    assert value == 8 and record.names[name] == "L['x'].size()[0]"


def test_buffers_are_what_the_planner_takes():
    assert lifetimes_of(traced(lambda x: x.sin().cos().exp(), torch.randn(KB))) == [
        Buffer("sin", 0, 2, 1024),
        Buffer("cos", 1, 3, 1024),
    ]


def test_devices_are_pools_of_their_own():
    found = [Lifetime("a", 0, 2, 100, device="npu"), Lifetime("b", 0, 2, 60), Lifetime("c", 1, 2, 30)]
    both = Liveness(tuple(found), 2)
    assert both.device == "npu" and [b.id for b in both.buffers()] == ["a"]
    assert [b.id for b in both.buffers(device="cpu")] == ["b", "c"]
    assert both.peak().bytes == 100


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 99)), max_size=12))
def test_the_peak_is_that_of_a_sweep(drawn):
    found = peak_of(Lifetime(str(i), start, start + n, size) for i, (start, n, size) in enumerate(drawn))
    assert found.bytes == sweep([(start, start + n, size) for start, n, size in drawn])
    assert sum(x.bytes for x in found.live) == found.bytes


def _program(seed: int) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """A random straight-line program over views, writes, multi-output and ordinary operators."""

    def run(x: torch.Tensor, y: torch.Tensor) -> Any:
        draw = random.Random(seed)
        values = [x.clone(), y * 2]
        for _ in range(draw.randint(3, 14)):
            a, b = (draw.choice(values[-4:]) for _ in range(2))
            step = draw.randrange(10)
            if step == 0:
                values.append(a.transpose(0, 1))
            elif step == 1:
                values.append(a[draw.randrange(a.shape[0]) :])
            elif step == 2:
                values += a.split(max(1, a.shape[0] // 2))
            elif step == 3:
                values.append(torch.cat([a.reshape(-1), b.reshape(-1)]).view(1, -1))
            elif step == 4:
                values += [v.view(1, -1) for v in a.reshape(-1).topk(1)]
            elif step == 5 and a.is_floating_point():
                a.mul_(2)
            elif step == 6:
                values.append(a.reshape(-1).expand(3, -1).contiguous())
            elif step == 7:
                values += list(a.max(1, keepdim=True))
            else:
                values.append(a + 1 if step == 8 else a.double())
        return values[-1], values[-2].sum(), draw.choice(values)

    return run


@given(st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_random_programs_take_what_an_execution_weighs(seed):
    args = torch.randn(4, 6), torch.randn(5, 3)
    gm = traced(_program(seed), *args)
    found = liveness(gm)
    assert found.peak().bytes == Measured(gm).weigh(*(a.clone() for a in args))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(32, 128, bias=False), nn.Linear(128, 32, bias=False), nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.norm(x)
        h = h + self.down(F.relu(self.up(h)))
        left, right = h.chunk(2, -1)
        return (left * right).sum(-1), h.amax(1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_prediction_equals_what_the_allocator_hands_out_on_the_reference_target(dynamic):
    """Nothing of this model allocates inside a kernel, so the allocator's peak is the predicted one to the byte."""
    backend = ascend_dynamo.Backend({"target": "reference", "strict": True})
    compiled = torch.compile(Net().eval(), backend=backend, dynamic=dynamic)
    x = torch.randn(4, 24, 32)
    with torch.no_grad():
        compiled(x)
        measured = allocated_peak(compiled, x)
    (record,) = backend.records
    assert record.memory is not None and record.memory.exact
    assert record.memory.peak == measured


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.RMSNorm(32), nn.Linear(32, 96, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 2, 16).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, 32) + x


def test_dialect_operators_have_workspace_on_the_reference_target():
    """A reference is ordinary PyTorch: its scores are workspace of the operator, which the graph does not show. So the
    allocator's peak is the prediction and what one attention holds besides: scores, mask and their softmax."""
    backend = ascend_dynamo.Backend({"target": "reference", "strict": True})
    compiled = torch.compile(Attention().eval(), backend=backend)
    x = torch.randn(2, 24, 32)
    with torch.no_grad():
        compiled(x)
        measured = allocated_peak(compiled, x)
    (record,) = backend.records
    assert record.count("flash_attention") and record.memory is not None
    scores = 2 * 2 * 24 * 24 * 4
    assert record.memory.peak < measured <= record.memory.peak + 6 * scores
