"""Loops that hand each expert the tokens that chose it: sizes depend on the data, and yet one graph serves them all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ascend_dynamo.backend import Backend

E, K, H, I = 3, 2, 8, 4
# What else would fuse inside an expert that is left alone stays off: the reasons speak of the graph as it is written.
OPTIONS = {"target": "reference", "validate": True, "strict": True, "patterns": {"merge_linears": False}}


class Expert(nn.Module):
    def __init__(self, act=F.silu) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, I, False), nn.Linear(H, I, False), nn.Linear(I, H, False)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """A router and ``loop(model, x [T, H], weights, ids)``."""

    def __init__(self, loop, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loop, self.router = loop, nn.Linear(H, E, False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.up, self.down = nn.Parameter(torch.randn(E, 2 * I, H)), nn.Parameter(torch.randn(E, H, I))
        self.to(dtype)

    def forward(self, x):
        weights, ids = torch.softmax(self.router(x).float(), -1).topk(K, -1)
        return self.loop(self, x, weights, ids)


def mixtral(self, x, weights, ids):
    """transformers 4: a one-hot mask with the experts in front, rows taken through a new axis."""
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
    out = torch.zeros(x.shape, dtype=x.dtype)
    mask = F.one_hot(ids, E).permute(2, 1, 0)
    for e in range(E):
        place, token = torch.where(mask[e])
        current = x[None, token].reshape(-1, H)
        out.index_add_(0, token, (self.experts[e](current) * weights[token, place, None]).to(x.dtype))
    return out


def deepseek(self, x, weights, ids):
    """DeepSeek's own code: results added in place to the rows that are read."""
    y = torch.zeros_like(x)
    for e in range(E):
        token, place = torch.where(ids == e)
        y[token] += self.experts[e](x[token]) * weights[token, place, None].type_as(x)
    return y


def wide_sum(self, x, weights, ids):
    """transformers' DeepSeek-V3: the sum in the dtype of the weights; the mask permuted otherwise."""
    y = torch.zeros_like(x, dtype=weights.dtype)
    mask = F.one_hot(ids, E).permute(2, 0, 1)
    for e in range(E):
        token, place = torch.where(mask[e])
        y.index_add_(0, token, self.experts[e](x[token]) * weights[token, place].unsqueeze(-1))
    return y.type(x.dtype)


def batched(self, x, weights, ids):
    """Parameters of all experts, and the share of every token looked up at the tokens of one."""
    y = torch.zeros_like(x)
    for e in range(E):
        token, _ = torch.where(ids == e)
        gate, up = F.linear(x[token], self.up[e]).chunk(2, -1)
        share = (weights * (ids == e)).sum(-1)[token, None].to(x.dtype)
        y = y.index_add(0, token, share * F.linear(F.gelu(gate) * up, self.down[e]))
    return y


def compiled(loop, dtype=torch.float32, **options):
    """(model, the compiled model, its backend); nothing is left out of the graph."""
    torch._dynamo.reset()
    model, backend = Model(loop, dtype), Backend(OPTIONS, texts=True)
    return model, torch.compile(model, backend=backend, fullgraph=True, **options), backend


@pytest.fixture(autouse=True)
def capture_sizes_that_depend_on_data():
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def routed(tokens, one=None, dtype=torch.float32):
    return torch.randn(tokens, H, dtype=dtype) if one is None else one.to(dtype).repeat(tokens, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loop", [mixtral, deepseek, wide_sum, batched], ids=lambda f: f.__name__)
def test_one_graph_whatever_the_routing(loop, dtype):
    model, fast, backend = compiled(loop, dtype)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    used = set()
    for one in (None, None, torch.randn(1, H), -torch.randn(1, H), torch.zeros(1, H)):
        x = routed(6, one, dtype)
        ids = torch.softmax(model.router(x).float(), -1).topk(K, -1).indices
        used.add(tuple(torch.bincount(ids.flatten(), minlength=E).tolist()))
        torch.testing.assert_close(fast(x), model(x), **tolerance)
    assert len(used) > 2 and any(0 in counts for counts in used)  # experts with other numbers of tokens, and with none
    assert len(backend.records) == 1 and backend.records[0].count("moe_loop") == 1


@pytest.mark.parametrize("loop", [mixtral, deepseek, wide_sum, batched], ids=lambda f: f.__name__)
def test_any_number_of_tokens(loop):
    model, fast, backend = compiled(loop, dynamic=True)
    for tokens in (4, 7, 23):
        x = routed(tokens)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert len(backend.records) == 1 and backend.records[0].count("moe_loop") == 1


def test_nothing_waits_for_the_data_any_more():
    _, fast, backend = compiled(mixtral)
    fast(routed(6))
    after = backend.records[0].after
    assert "nonzero" in backend.records[0].before and "nonzero" not in after and "_assert_scalar" not in after


def test_parameters_stay_what_they_were():
    model, fast, _ = compiled(deepseek)
    x = routed(6)
    fast(x)
    model.experts[1].up.weight.mul_(2)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def template(self, x, weights, ids, *, order=range(E), index=lambda e: e, start=torch.zeros_like, rows=None,
             share=None, chosen=None, into=None, spy=None):  # fmt: skip
    """``deepseek`` by index_add with one step exchanged."""
    y, seen = start(x), []
    for e in order:
        token, place = torch.where(chosen(ids, e) if chosen else ids == e)
        h = self.experts[index(e)](rows(x, token, place) if rows else x[token])
        w = share(weights, token, place) if share else weights[token, place, None]
        y = y.index_add(0, into(token, place) if into else token, h * w)
        seen.append(y)
    return (y, seen[0]) if spy else y


def near(**steps):
    return lambda *args: template(*args, **steps)


NEAR = {
    "an expert is missing": (near(order=(0, 2)), "arg", "0, 1, ... once"),
    "an expert comes twice": (near(order=(0, 1, 2, 2)), "arg", "0, 1, ... once"),
    "weights of another expert twice": (near(index=lambda e: e % 2), "alias", "used by one expert"),
    "not from zeros": (near(start=torch.clone), "op", "starts from zeros"),
    "a sum on the way is returned": (near(spy=True), "users", "used only by the fusion"),
    "rows of another x": (near(rows=lambda x, t, p: (x + t.numel())[t]), "arg", "the same input"),
    "rows by the place": (near(rows=lambda x, t, p: x[p]), "op", "x at the tokens"),
    "weights by the place": (near(share=lambda w, t, p: w[p, p, None]), "op", "weights of its tokens"),
    "weights of the first place": (near(share=lambda w, t, p: w[t, torch.zeros_like(p), None]), "op", "of its tokens"),
    "weights of the place of the transpose": (near(share=lambda w, t, p: w.T[p, t, None]), "op", "of its tokens"),
    "added at the places": (near(into=lambda t, p: p), "op", "tokens that chose"),
    "those who did not choose it": (near(chosen=lambda i, e: i != e), "op", "tokens that chose"),
    "one chosen by other ids": (near(chosen=lambda i, e: (i.flip(1) if e == 1 else i) == e), "arg", "the same ids"),
    "added twice over": (near(into=lambda t, p: t // 2), "op", "tokens that chose"),
}


def test_the_template_itself_is_recognised():
    model, fast, backend = compiled(template)
    x = routed(6)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert backend.records[0].count("moe_loop") == 1


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_say_what_stopped_them(name):
    loop, code, expected = NEAR[name]
    model, fast, backend = compiled(loop)
    x = routed(6)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    found = max((m for m in backend.records[0].missed if m.pattern == "moe_loop"), key=lambda m: m.progress)
    assert backend.records[0].count("moe_loop") == 0 and found.code == code and expected in found.reason, found


def test_rows_that_are_overwritten_must_be_distinct():
    def loop(self, x, weights, ids):
        return deepseek(self, x, weights, torch.div(ids, 2, rounding_mode="floor"))

    model, fast, backend = compiled(loop)
    x = routed(6)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    missed = [m for m in backend.records[0].missed if m.pattern == "moe_loop"]
    assert backend.records[0].count("moe_loop") == 0 and any("ids that differ" in m.reason for m in missed)
