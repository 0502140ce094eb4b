"""Which ops become kernels on the CPU, why others do not, and that whole models stay right."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ascend_dynamo
from ascend_dynamo.capture import trace
from ascend_dynamo.errors import LoweringError
from ascend_dynamo.lowering.cpu import CpuLowering, kernels
from ascend_dynamo.normalize import normalize
from ascend_dynamo.options import Options
from ascend_dynamo.passes.pipeline import Lower
from ascend_dynamo.report.records import CompileRecord

attention = torch.ops.ascend.flash_attention


def lowered(fn, *args: torch.Tensor) -> list[tuple[str, str, str]]:  # type: ignore[no-untyped-def]
    """(op, path, reason) of every op that the CPU target was asked about."""
    unit, record = trace(fn, args), CompileRecord()
    normalize(unit)
    Lower(CpuLowering(), record).run(unit, Options())
    unit.gm.recompile()
    expected = fn(*args)
    torch.testing.assert_close(unit.gm(*args)[0], expected, rtol=2e-2, atol=2e-2)
    return [(entry.op.split(".")[1], entry.path, entry.reason) for entry in record.lowered]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which the kernels gain, whatever this one is (they fall back to ATen by themselves)."""
    kernels.load()
    monkeypatch.setattr(kernels, "isa", lambda: "avx512_bf16")


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linears_with_their_activation_become_one_kernel(dtype: torch.dtype) -> None:
    x, w, b = (torch.randn(s, dtype=dtype) for s in ((2, 3, 64), (128, 64), (128,)))
    assert lowered(F.linear, x, w, b) == [("linear", "kernel", "")]
    for activation in (F.gelu, F.silu, F.relu, lambda t: F.gelu(t, approximate="tanh"), torch.ops.ascend.swiglu):
        ops = lowered(lambda x, w, f=activation: f(F.linear(x, w)), x, w)
        assert [path for _, path, _ in ops] == ["kernel", "kernel"]


@pytest.mark.usefixtures("fast")
def test_an_activation_is_not_taken_from_a_linear_that_others_use() -> None:
    x, w = torch.randn(3, 64), torch.randn(64, 64)
    ops = lowered(lambda x, w: (lambda y: F.gelu(y) + y)(F.linear(x, w)), x, w)
    assert ops[1][1] == "reference" and "used elsewhere" in ops[1][2]
    ops = lowered(lambda x: F.gelu(x), x)
    assert ops[0][1] == "reference" and "linear kernel" in ops[0][2]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("call", "dtype", "reason"),
    [
        (lambda q: attention(q, q, q, scale=0.3, empty_row="zero"), torch.bfloat16, ""),
        (lambda q: attention(q, q, q, scale=0.3, empty_row="uniform"), torch.bfloat16, ""),
        (lambda q: attention(q, q, q, scale=0.3), torch.float64, "expected bfloat16 or float32"),
        (lambda q: attention(q, q, q, scale=0.3), torch.float16, ""),
        (lambda q: attention(q, q, q, scale=0.3, softcap=5.0), torch.float16, ""),
        (lambda q: attention(q, q, q[..., :8], scale=0.3), torch.float16, ""),
    ],
)
def test_attention(call, dtype: torch.dtype, reason: str) -> None:  # type: ignore[no-untyped-def]
    ((_, path, found),) = lowered(call, torch.randn(1, 2, 8, 16, dtype=dtype))
    assert (path, reason == "") == (("kernel", True) if not reason else ("reference", False)) and reason in found


@pytest.mark.parametrize(
    ("options", "path"), [({}, "reference"), ({"softcap": 5.0}, "kernel"), ({"sinks": torch.zeros(2)}, "kernel")]
)
def test_without_vectors_attention_is_ours_where_scores_would_be_written_out(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], path: str
) -> None:
    kernels.load()
    monkeypatch.setattr(kernels, "isa", lambda: "portable")
    q = torch.randn(1, 2, 8, 16)
    assert lowered(lambda q: attention(q, q, q, scale=0.3, **options), q)[0][1] == path
    assert lowered(lambda q: attention(q, q, q[..., :8], scale=0.3), q)[0][1] == "kernel"


@pytest.mark.usefixtures("fast")
def test_a_permuted_bias_is_written_in_the_order_of_the_kernel_once_for_all_layers() -> None:
    q, table = torch.randn(1, 2, 8, 16), torch.randn(8, 8, 2)

    def layers(q: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        bias = table.permute(2, 0, 1)[None]
        q = attention(q, q, q, scale=0.3, bias=bias)
        return attention(q, q, q, scale=0.3, bias=bias)

    unit, record = trace(layers, (q, table)), CompileRecord()
    normalize(unit)
    Lower(CpuLowering(), record).run(unit, Options())
    clones = unit.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    assert len(clones) == 1 and [e.path for e in record.lowered] == ["kernel", "kernel"]
    unit.gm.recompile()
    torch.testing.assert_close(unit.gm(q, table)[0], layers(q, table))


def test_without_a_compiler_or_vectors_the_reference_runs_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(3, 64), torch.randn(64, 64)

    def no_compiler() -> str:
        raise LoweringError("no C++ compiler was found: install g++")

    monkeypatch.setattr(kernels, "isa", no_compiler)
    assert "install g++" in lowered(F.linear, x, w)[0][2]
    monkeypatch.setattr(kernels, "isa", lambda: "portable")
    assert "AVX-512" in lowered(F.linear, x, w)[0][2]


class Layer(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(width, 96), nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_through_inductor(dtype: torch.dtype, dynamic: bool) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Layer().eval()
    exact = Layer().eval()
    exact.load_state_dict(model.state_dict())
    model, exact = model.to(dtype), exact.to(dtype).double()
    backend = ascend_dynamo.Backend({"target": "cpu", "expect": {"flash_attention": 1, "swiglu": 1}})
    run = torch.compile(model, backend=backend, dynamic=dynamic)
    for length in (7, 9) if dynamic else (7,):
        x = torch.randn(2, length, 64, dtype=dtype)
        f64, eager, ours = exact(x.double()), model(x), run(x)
        assert ours.dtype == dtype and ours.stride() == eager.stride()
        budget = 2 * (eager - f64).abs().max() + 8 * torch.finfo(dtype).eps * f64.abs().max()
        assert (ours - f64).abs().max() <= budget
    assert len(backend.records) == 1 and not backend.records[0].quarantined
    with torch.no_grad():
        model.q.weight.data.mul_(2)
    torch.testing.assert_close(run(x), model(x), rtol=5e-2, atol=5e-2)
