"""The program that Inductor wrote, read as what it allocates: known texts, a real compilation against the allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_support import allocated_peak, traced
from torch import fx, nn

import ascend_dynamo
import ascend_dynamo.dialect
from ascend_dynamo.memory import Liveness
from ascend_dynamo.memory.generated import UnreadableProgramError, read_program
from ascend_dynamo.memory.predict import of_inductor

HEAD = """
aten = torch.ops.aten
class Runner:
    def call(self, args):
        arg0_1, arg1_1 = args
        args.clear()
        s0 = arg0_1
"""


def program(*lines: str) -> str:
    return HEAD + "\n".join("        " + line for line in lines)


def graph() -> fx.GraphModule:
    return traced(lambda n, x: (x.sin(), x.topk(3), (x + 1).sum() + n), 6, torch.randn(6, 16), symbolic=True)


def read(*lines: str) -> dict[str, tuple[int, int, str, bool]]:
    found = read_program(program(*lines), graph())
    return {x.id: (x.start, x.end, str(x.bytes), x.output) for x in found.lifetimes}


EMPTY = "buf{} = empty_strided_cpu((s0, 16), (16, 1), torch.{})"


def test_allocations_kernels_and_frees():
    found = read(
        EMPTY.format(0, "float32"),
        "cpp_fused_0(arg1_1, buf0, s0)",
        "del arg1_1",
        EMPTY.format(1, "bfloat16"),
        "cpp_fused_1(buf0, buf1, s0)",
        "del buf0",
        "return (buf1, )",
    )
    assert found == {"buf0": (0, 4, "64*s0", False), "buf1": (2, 4, "32*s0", True)}


def test_a_reused_buffer_is_one_allocation_under_two_names():
    found = read(
        EMPTY.format(0, "float32"),
        "cpp_fused_0(arg1_1, buf0, s0)",
        "buf1 = buf0; del buf0  # reuse",
        "cpp_fused_1(buf1, s0)",
        "buf2 = reinterpret_tensor(buf1, (16, s0), (s0, 1), 0); del buf1  # reuse",
        "extern_kernels.mm(buf2, arg1_1, out=buf2)",
        "del buf2",
        EMPTY.format(3, "float32"),
        "cpp_fused_2(buf3)",
        "return (reinterpret_tensor(buf3, (s0, 4, 4), (16, 4, 1), 0), )",
    )
    assert found == {"buf0": (0, 4, "64*s0", False), "buf3": (4, 6, "64*s0", True)}


def test_results_of_opaque_operators_get_their_size_from_assertions_and_their_dtype_from_the_graph():
    found = read(
        "buf0 = torch.ops.aten.topk.default(arg1_1, 3)",
        "buf1 = buf0[0]",
        "assert_size_stride(buf1, (s0, 3), (3, 1), 'torch.ops.aten.topk.default')",
        "buf2 = buf0[1]",
        "assert_size_stride(buf2, (s0, 3), (3, 1), 'torch.ops.aten.topk.default')",
        "del buf0",
        "cpp_fused_0(buf1)",
        "del buf1",
        "return (buf2, )",
    )
    assert found == {"buf0[0]": (0, 2, "12*s0", False), "buf0[1]": (0, 2, "24*s0", True)}


def test_results_that_nobody_takes_live_as_long_as_the_tuple():
    found = read(
        "buf0 = torch.ops.aten.topk.default(arg1_1, 3)",
        "buf1 = buf0[1]",
        "assert_size_stride(buf1, (s0, 3), (3, 1), 'torch.ops.aten.topk.default')",
        "del buf0",
        "cpp_fused_0(buf1)",
        "return (buf1, )",
    )
    assert {k: v[:2] for k, v in found.items()} == {"buf0[0]": (0, 1), "buf0[1]": (0, 2)}


def test_views_and_writes_of_operators_allocate_nothing():
    found = read(
        EMPTY.format(0, "float32"),
        "buf1 = torch.ops.aten.slice.Tensor(buf0, 0, 0, 2)",
        "del buf0",
        "torch.ops.aten.add_.Tensor(buf1, 1)",
        "buf2 = torch.ops.ascend.kv_write.default(arg1_1, arg1_1, arg1_1, arg1_1, arg1_1)",
        "del buf1",
        "return ()",
    )
    assert found == {"buf0": (0, 4, "64*s0", False)}


def test_checks_and_numbers_allocate_nothing():
    found = read(
        "assert s0 > 0",
        EMPTY.format(0, "int64"),
        "cpp_fused_0(buf0)",
        "u0 = buf0.item()",
        "if not (u0 >= 0): raise RuntimeError('u0 >= 0')",
        "buf0 = None",
        "buf1 = empty_strided_cpu((u0, ), (1, ), torch.float32)",
        "cpp_fused_1(buf1)",
        "return (buf1, )",
    )
    assert found == {"buf0": (0, 3, "128*s0", False), "buf1": (3, 5, "4*u0", True)}


def test_sizes_come_from_the_inputs_and_lines_from_the_stack_traces():
    text = program(EMPTY.format(0, "float32"), "cpp_fused_0(buf0)", "return (buf0, )")
    line = 1 + text.splitlines().index("        " + EMPTY.format(0, "float32"))
    found = read_program(text, graph(), [(1, 'File "a.py", line 3, in f'), (line, 'File "b.py", line 7, in f')])
    (buf0,) = found.lifetimes
    assert buf0.src == ("b.py", 7) and buf0.op == "cpp_fused_0"
    assert found.sizes_of([40, torch.empty(40, 16)]) == {"s0": 40}
    assert found.peak({"s0": 40}).bytes == 40 * 64


@pytest.mark.parametrize(
    "line",
    [
        "if arg0_1: buf0 = arg1_1",
        "buf0 = some.thing(arg1_1) + 1",
        "buf0, buf1 = torch.ops.aten.topk.default(arg1_1, 3)",
        "buf0 = empty_strided_cpu((s0, f(s0)), (1, 1), torch.float32)",
        "buf0 = empty_strided_cpu((s0, 4), (4, 1), torch.nothing)",
    ],
)
def test_what_is_not_known_is_refused(line):
    with pytest.raises(UnreadableProgramError):
        read(line, "return ()")


def test_a_result_without_a_size_is_refused():
    with pytest.raises(UnreadableProgramError, match="nothing tells the size of buf0"):
        read("buf0 = torch.ops.aten.nonzero.default(arg1_1)", "del buf0", "return ()")


def test_without_a_program_the_graph_is_the_upper_bound():
    found = of_inductor(lambda args: args, graph())
    assert not found.exact and found.source == "fx" and len(found.lifetimes) == 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 96, bias=False), nn.Linear(96, 48, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.down(torch.sigmoid(self.up(x)) * 2)
        return y.topk(4).values, y + x


@pytest.mark.slow
def test_the_prediction_for_the_cpu_equals_what_the_allocator_hands_out(monkeypatch):
    """Neither the linear kernel in float32 nor generated loops allocate for themselves, so the allocator's peak is the
    predicted one to the byte; the last shape was never run when its peak was predicted."""
    found: list[Liveness] = []

    def predicted(*args: Any) -> Liveness:
        found.append(of_inductor(*args))
        return found[-1]

    monkeypatch.setattr("ascend_dynamo.lowering.cpu.lower.of_inductor", predicted)
    backend = ascend_dynamo.Backend({"target": "cpu", "strict": True, "level": 0, "arena": "off"})
    compiled = torch.compile(Block().eval(), backend=backend, dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(3, 7, 48))
        (lifetimes,) = found
        assert lifetimes.source == "inductor" and lifetimes.exact and len(lifetimes.symbols) == 2
        for shape in ((3, 7, 48), (5, 64, 48)):
            sizes = dict(zip((s.name for s in lifetimes.symbols), shape, strict=False))
            assert allocated_peak(compiled, torch.randn(shape)) == lifetimes.peak(sizes).bytes
    assert len(backend.records) == 1


@pytest.mark.slow
def test_the_prediction_for_the_cpu_equals_the_recorded_first_call():
    backend = ascend_dynamo.Backend({"target": "cpu", "strict": True, "level": 0})
    compiled = torch.compile(Block().eval(), backend=backend, dynamic=True)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.randn(3, 7, 48))
    (record,) = backend.records
    assert record.memory is not None and record.memory.source == "inductor"
    if not backend.memory().reason:  # torch takes one allocator only, and another one may have been there first
        assert record.memory.recorded == record.memory.lower_bound == record.memory.arena
        assert record.memory.ratio == 1.0
