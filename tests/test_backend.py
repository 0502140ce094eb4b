"""The backend end to end on the reference target: exact, and cheap enough to try every way of calling it."""

import math
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ascend_dynamo
from ascend_dynamo.errors import ExpectError, OptionError
from ascend_dynamo.log import Once

REFERENCE = {"target": "reference"}


class Block(nn.Module):
    """A small pre-norm block with everything that the built-in patterns look for."""

    def __init__(self, width: int = 32, heads: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 48, bias=bias), nn.Linear(width, 48, bias=bias)
        self.down = nn.Linear(48, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        split = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (proj(h).view(split).transpose(1, 2) for proj in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(x.shape))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@pytest.fixture(autouse=True)
def fresh_dynamo():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, options=None, **kwargs):  # type: ignore[no-untyped-def]
    backend = ascend_dynamo.Backend({**REFERENCE, **(options or {})})
    return torch.compile(model, backend=backend, **kwargs), backend


@torch.no_grad()
def test_by_name() -> None:
    model, x = Block().eval(), torch.randn(2, 5, 32)
    expected = model(x)
    out = torch.compile(model, backend="ascend_opt", options=REFERENCE)(x)
    torch.testing.assert_close(out, expected)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False, None])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_dynamic_and_fullgraph(dynamic, fullgraph) -> None:  # type: ignore[no-untyped-def]
    model = Block().eval()
    run, backend = compiled(model, dynamic=dynamic, fullgraph=fullgraph)
    for length in (5, 7, 9):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(run(x), model(x))
    assert len(backend.records) == {True: 1, False: 3, None: 2}[dynamic]
    assert all(r.fired for r in backend.records) and not any(r.quarantined for r in backend.records)


@torch.no_grad()
def test_what_fires_in_a_block() -> None:
    model = Block().eval()
    run, backend = compiled(model, {"expect": {"flash_attention": 1, "swiglu": 1, "merge_linears": 2}})
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(run(x), model(x))
    (record,) = backend.records
    assert record.count("add_layer_norm") == 1 and record.count("rms_norm") == 1


@torch.no_grad()
def test_expect_not_met_is_an_error() -> None:
    run, _ = compiled(Block().eval(), {"expect": {"flash_attention": 2}})
    with pytest.raises(Exception, match="flash_attention") as caught:
        run(torch.randn(2, 5, 32))
    assert (
        isinstance(caught.value, ExpectError)
        or isinstance(caught.value.__cause__, ExpectError)
        or ("ExpectError" in str(caught.value))
    )


def test_wrong_option_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="strict"):
        ascend_dynamo.Backend({"strickt": True})


def test_gradients_flow_without_fusions() -> None:
    model, x = Block(), torch.randn(2, 5, 32, requires_grad=True)
    run, backend = compiled(model)
    out = run(x).sum()
    got = torch.autograd.grad(out, [x, *model.parameters()])
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
    assert backend.records[0].training and not backend.records[0].fired


def test_switching_between_training_and_inference() -> None:
    model, x = Block(), torch.randn(2, 5, 32)
    run, backend = compiled(model)
    with torch.no_grad():
        run(x)
    run(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert [r.training for r in backend.records] == [False, True]


def test_inference_mode() -> None:
    model, x = Block().eval(), torch.randn(2, 5, 32)
    run, backend = compiled(model)
    with torch.inference_mode():
        torch.testing.assert_close(run(x), model(x))
    assert backend.records[0].fired


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype) -> None:  # type: ignore[no-untyped-def]
    model, x = Block().eval(), torch.randn(2, 5, 32)
    run, _ = compiled(model)
    with torch.autocast("cpu", dtype):
        out, expected = run(x), model(x)
        assert run(x).dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert nn.Linear(4, 4)(torch.randn(1, 4)).dtype == torch.float32
    linear = nn.Linear(8, 8)
    with torch.autocast("cpu", dtype):
        assert compiled(linear)[0](torch.randn(2, 8)).dtype == dtype


@torch.no_grad()
def test_graph_breaks_and_several_graphs() -> None:
    model = Block().eval()

    def twice(x):  # type: ignore[no-untyped-def]
        x = model(x)
        torch._dynamo.graph_break()
        return model(x)

    run, backend = compiled(twice)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(run(x), twice(x))
    assert len(backend.records) == 2 and all(r.fired for r in backend.records)


@torch.no_grad()
def test_two_models_with_different_options() -> None:
    a, b, x = Block().eval(), Block().eval(), torch.randn(2, 5, 32)
    run_a, backend_a = compiled(a)
    run_b, backend_b = compiled(b, {"level": "O0"})
    torch.testing.assert_close(run_a(x), a(x))
    torch.testing.assert_close(run_b(x), b(x))
    assert backend_a.records[0].fired and not backend_b.records[0].fired


@torch.no_grad()
def test_patterns_off_by_name() -> None:
    run, backend = compiled(Block().eval(), {"patterns": {"flash_attention": False}})
    run(torch.randn(2, 5, 32))
    assert backend.records[0].count("flash_attention") == 0 and backend.records[0].fired


def test_threads() -> None:
    models = [Block().eval() for _ in range(4)]
    runs = [compiled(m)[0] for m in models]
    x, errors = torch.randn(2, 5, 32), []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                torch.testing.assert_close(runs[i](x), models[i](x))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


@torch.no_grad()
def test_two_caches_one_compile() -> None:
    class Cell(nn.Module):
        def forward(self, cache, position, value):  # type: ignore[no-untyped-def]
            cache.index_copy_(1, position, value)
            return cache.sum()

    run, backend = compiled(Cell(), fullgraph=True)
    for _ in range(2):
        cache = torch.zeros(2, 8)
        torch._dynamo.mark_static_address(cache)
        assert run(cache, torch.tensor([3]), torch.ones(2, 1)) == 2 and cache[0, 3] == 1
    assert len(backend.records) == 1


@torch.no_grad()
def test_input_mutation_reads_before_and_after() -> None:
    def step(x, y):  # type: ignore[no-untyped-def]
        before = x * 2
        x.add_(y)
        x[:, 1:3] = 0
        return before, x * 2, x

    run, _ = compiled(step)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    x1, x2 = x.clone(), x.clone()
    out, expected = run(x1, y), step(x2, y)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True)) and torch.equal(x1, x2)
    assert out[2] is x1


@torch.no_grad()
def test_outputs_that_are_copies_stay_copies() -> None:
    def f(x):  # type: ignore[no-untyped-def]
        return x.clone(), x.clone(), x + 0 * x, x.view(-1)

    run, _ = compiled(f)
    x = torch.randn(3, 4)
    a, b, c, d = run(x)
    a.zero_()
    assert x.abs().sum() > 0 and b.abs().sum() > 0 and c.abs().sum() > 0
    assert d.data_ptr() == x.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: (x + 1).transpose(0, 2),
        lambda x: (x * 2).permute(2, 0, 1)[:, :1],
        lambda x: (x * 2)[..., ::2],
        lambda x: (x.sum(-1, keepdim=True) * 2).expand(2, 3, 4),
    ],
)
def test_output_strides_are_eagers(f) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, 3, 4)
    out, expected = compiled(f)[0](x), f(x)
    assert out.stride() == expected.stride() and torch.equal(out, expected)


@torch.no_grad()
def test_zero_size_batch() -> None:
    model = Block().eval()
    run, _ = compiled(model, dynamic=False)
    x = torch.randn(0, 5, 32)
    assert run(x).shape == model(x).shape


@torch.no_grad()
def test_complex_and_sparse() -> None:
    weight = torch.randn(4, 4, dtype=torch.complex64)
    run, _ = compiled(lambda x: torch.nn.functional.linear(x, weight) @ weight)
    x = torch.randn(3, 4, dtype=torch.complex64)
    torch.testing.assert_close(run(x), torch.nn.functional.linear(x, weight) @ weight)
    sparse = torch.eye(4).to_sparse()
    run, _ = compiled(lambda s, y: torch.sparse.mm(s, y) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(run(sparse, torch.ones(4, 2)), torch.full((4, 2), 2.0))


@torch.no_grad()
@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.q.weight.data.mul_(1.5),
        lambda m: m.k.weight.data.add_(0.1),
        lambda m: setattr(m.v.weight, "data", m.v.weight.data * 2),
        lambda m: m.gate.load_state_dict({"weight": torch.randn(48, 32)}),
        lambda m: setattr(m, "q", nn.Linear(32, 32, bias=False)),
    ],
)
def test_weights_edited_after_compile(edit) -> None:  # type: ignore[no-untyped-def]
    model, x = Block().eval(), torch.randn(2, 5, 32)
    run, backend = compiled(model)
    run(x)
    assert backend.records[0].count("merge_linears") >= 1
    edit(model)
    torch.testing.assert_close(run(x), model(x))


@torch.no_grad()
def test_merged_weights_survive_saving(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = Block().eval(), torch.randn(2, 5, 32)
    expected = model(x)
    compiled(model)[0](x)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other = Block().eval()
    other.load_state_dict(torch.load(tmp_path / "m.pt"))
    torch.testing.assert_close(other(x), expected)


@torch.no_grad()
def test_an_internal_failure_never_breaks_the_model(monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    import ascend_dynamo.passes.pipeline as pipeline

    def broken(unit):  # type: ignore[no-untyped-def]
        raise RuntimeError("planted failure")

    monkeypatch.setattr(pipeline, "normalize", broken)
    model, x = Block().eval(), torch.randn(2, 5, 32)
    run, backend = compiled(model)
    torch.testing.assert_close(run(x), model(x))
    assert "planted failure" in backend.records[0].quarantined[0].error
    assert any("compiled without them" in r.message for r in caplog.records)
    strict, _ = compiled(Block().eval(), {"strict": True})
    with pytest.raises(Exception, match="planted failure"):
        strict(x)


@torch.no_grad()
def test_dump_writes_texts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    run, _ = compiled(Block().eval(), {"dump": str(tmp_path)})
    run(torch.randn(2, 5, 32))
    (folder,) = tmp_path.iterdir()
    assert "ascend.flash_attention" in (folder / "after.txt").read_text()
    assert "aten.scaled_dot_product_attention" in (folder / "before.txt").read_text()


@torch.no_grad()
def test_no_guard_is_added() -> None:
    model = Block().eval()
    run, backend = compiled(model, dynamic=True)
    for batch, length in ((2, 31), (3, 16), (5, 7), (31, 9)):
        x = torch.randn(batch, length, 32)
        torch.testing.assert_close(run(x), model(x))
    assert len(backend.records) == 1


@torch.no_grad()
def test_float_attributes_are_constants_and_float_arguments_are_not() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps, self.weight = 1e-6, nn.Parameter(torch.randn(32))

        def forward(self, x: torch.Tensor, temperature: float) -> torch.Tensor:
            n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
            return self.weight * n / temperature * (math.pi / 4)

    model = Norm()
    run, backend = compiled(model, dynamic=True)
    for length, temperature in ((5, 0.5), (7, 0.75), (9, 1.25)):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(run(x, temperature), model(x, temperature))
    assert len(backend.records) == 1 and backend.records[0].count("rms_norm") == 1


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False])
def test_effects_that_must_happen_in_order(dynamic: bool) -> None:
    """``linalg.inv`` checks its result by an op with an effect, for which capture makes a token."""
    run, backend = compiled(lambda x: torch.linalg.inv(x) @ x, {"strict": True}, dynamic=dynamic)
    x = torch.randn(4, 4) + 4 * torch.eye(4)
    torch.testing.assert_close(run(x), torch.eye(4), atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="singular"):
        run(torch.zeros(4, 4))
    assert not backend.records[0].quarantined


def test_the_named_backend_warns_of_gradients_once(monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("ascend_dynamo.backend._said", Once())
    for _ in range(2):
        torch.compiler.reset()
        model = nn.Linear(4, 4)
        torch.compile(model, backend="ascend_opt", options=REFERENCE)(torch.randn(2, 4)).sum().backward()
        assert model.weight.grad is not None
    assert sum("without fusions" in r.message for r in caplog.records) == 1
