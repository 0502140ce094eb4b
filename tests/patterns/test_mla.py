"""Latent attention: weights absorbed for few queries against many keys, exact in float64, left alone elsewhere."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from pattern_support import ALL, assert_same, fuse, run, snapshot
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils.flop_counter import FlopCounterMode

from ascend_dynamo import capture
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.match import run_patterns
from ascend_dynamo.normalize import normalize
from ascend_dynamo.options import Options
from ascend_dynamo.patterns import mla_absorb
from ascend_dynamo.patterns._calls import LAYOUT
from ascend_dynamo.patterns._mla import find_latent
from ascend_dynamo.patterns.spellings import mla as spelled
from ascend_dynamo.report.records import CompileRecord

MLA = ("sdpa", "eager_attention", "merge_linears", "mla_absorb")
B, H, S, RANK, N, V, P = 2, 3, 40, 24, spelled.N, spelled.V, 4
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(dtype=torch.float64, sq=1, b=B):
    q, c, r = torch.randn(b, H, sq, N + P), torch.randn(b, S, RANK), torch.randn(b, S, P)
    w = torch.randn(H * (N + V), RANK) / RANK**0.5
    return tuple(t.to(dtype) for t in (q, c, r, w))


class Latent(nn.Module):
    """DeepSeek's attention by hand: projections, norms and rotation, the latents and rotary keys of the past given."""

    def __init__(self, hidden=32, q_lora=None, half=True, norm=True):
        super().__init__()
        self.q = nn.Linear(hidden, H * (N + P), bias=False) if q_lora is None else None
        self.q_a = nn.Linear(hidden, q_lora, bias=False) if q_lora else None
        self.q_b = nn.Linear(q_lora, H * (N + P), bias=False) if q_lora else None
        self.kv_a = nn.Linear(hidden, RANK + P, bias=False)
        self.kv_norm = nn.RMSNorm(RANK, eps=1e-6) if norm else nn.Identity()
        self.kv_b = nn.Linear(RANK, H * (N + V), bias=False)
        self.o = nn.Linear(H * V, hidden, bias=False)
        self.half = half

    def rotate(self, x, cos, sin):
        if self.half:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-second, first), dim=-1) * sin
        even, odd = x[..., ::2], x[..., 1::2]
        return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin

    def forward(self, x, past_c, past_r, cos, sin):
        b, s, _ = x.shape
        q = self.q(x) if self.q is not None else self.q_b(self.q_a(x))
        q_nope, q_rope = q.view(b, s, H, N + P).transpose(1, 2).split([N, P], dim=-1)
        c, r = self.kv_a(x).split([RANK, P], dim=-1)
        c = torch.cat((past_c, self.kv_norm(c)), dim=1)
        r = torch.cat((past_r, self.rotate(r, cos, sin)), dim=1)
        kv = self.kv_b(c).view(b, -1, H, N + V).transpose(1, 2)
        k = torch.cat((kv[..., :N], r[:, None].expand(-1, H, -1, -1)), dim=-1)
        q = torch.cat((q_nope, self.rotate(q_rope, cos, sin)), dim=-1)
        y = F.scaled_dot_product_attention(q, k, kv[..., N:], scale=0.3)
        return self.o(y.transpose(1, 2).reshape(b, s, -1)), c, r


def decode(model, past=S, sq=1):
    """A function of tensors alone that decodes with ``model`` against ``past`` tokens, and its arguments."""
    names, weights = zip(*model.named_parameters(), strict=True)

    def fn(x, past_c, past_r, cos, sin, *weights):
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(model, given, (x, past_c, past_r, cos, sin))

    kind = weights[0].dtype
    shapes = ((B, sq, 32), (B, past, RANK), (B, past, P), (sq, P), (sq, P))
    return fn, (*(torch.randn(s, dtype=kind) for s in shapes), *(w.detach() for w in weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", range(len(spelled.SPELLINGS)))
def test_spellings(spelling, dtype):
    fn = spelled.SPELLINGS[spelling]
    args = spelled.fuzz_inputs(random.Random(spelling), dtype, spelling)
    result = fuse(fn, args, *MLA)
    assert result.count("mla_absorb") == 1 and result.ops("aten.linear") == 0
    assert_same(fn, args, result)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("q_lora", [None, 16])
def test_a_whole_layer_is_exact_in_float64(q_lora, half, norm):
    fn, args = decode(Latent(q_lora=q_lora, half=half, norm=norm).double())
    result = fuse(fn, args)
    assert result.count("mla_absorb") == 1
    for new, old in zip(run(result.unit, args), fn(*args), strict=True):
        assert (new - old).abs().max() <= 1e-10 * old.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_whole_layer_rounds_no_worse_than_eager(dtype):
    fn, args = decode(Latent().to(dtype))
    result = fuse(fn, args)
    assert result.count("mla_absorb") == 1
    exact = decode(Latent().double())[0](*(a.double() for a in args))[0]
    new, old = run(result.unit, args)[0], fn(*args)[0]
    assert (new.double() - exact).abs().max() <= 2 * (old.double() - exact).abs().max() + torch.finfo(dtype).eps


def test_the_past_is_no_longer_projected():
    """Outside of attention, no work grows with the past; without the rewrite all of it is projected."""
    model = Latent().double()
    others = [name for name in ALL.names if name != "mla_absorb"]

    def work(past, *names):
        fn, args = decode(model, past)
        result = fuse(fn, args, *names)
        with FlopCounterMode(display=False) as counter:  # it sees a dialect operator as one call, and does not count it
            run(result.unit, args)
        return counter.get_total_flops()

    assert work(128, *others) - work(64, *others) == 64 * 2 * B * H * RANK * (N + V)
    assert work(128) == work(64) > 0


def test_weights_are_views():
    fn, args = decode(Latent())
    result = fuse(fn, args, params=range(5, len(args)))
    unit = result.unit
    absorbed = [n for n in unit.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)]
    derived = {str(n.target) for n in unit.prologue.graph.find_nodes(op="placeholder")}
    assert len(absorbed) == 2
    for product in absorbed:
        n = next(a for a in product.args if a.meta["val"].shape[1] in (N, V))
        while n.op == "call_function":
            assert n.target in LAYOUT
            n = n.args[0]
        assert n.op == "placeholder" and n.name not in derived


@pytest.mark.parametrize("dynamic", ["past", "batch and past"])
def test_the_past_may_be_symbolic(dynamic):
    fn, args = decode(Latent())
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    free, fixed = DimDynamic.DYNAMIC, DimDynamic.STATIC
    first = free if "batch" in dynamic else fixed

    def fake(t, dims, like=None):
        return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))

    x, c, r, *rest = args
    fakes = [fake(x, [first, fixed, fixed]), fake(c, [first, free, fixed]), fake(r, [first, free, fixed])]

    def same_sizes(x, c, r, *more):  # sizes that Dynamo would have found equal
        torch._check(c.shape[0] == x.shape[0])
        torch._check(r.shape[0] == x.shape[0])
        torch._check(r.shape[1] == c.shape[1])
        return fn(x, c, r, *more)

    with torch.no_grad():
        unit = capture.trace(same_sizes, [*fakes, *rest], fake_mode=mode)
    normalize(unit)
    record = CompileRecord()
    run_patterns(unit, ALL.only(*MLA), Options.resolve(None, {"strict": True}, {}), record)
    assert record.count("mla_absorb") == 1
    other = [torch.randn(x.shape[0] + ("batch" in dynamic), *s) for s in ((1, 32), (S + 5, RANK), (S + 5, P))]
    for given in ((x, c, r), other):
        for new, old in zip(run(unit, (*given, *rest)), fn(*given, *rest), strict=True):
            torch.testing.assert_close(new, old)


def test_everything_else_is_handed_over():
    def fn(q, c, r, w, bias):
        kv = F.linear(c, w).view(B, S, H, N + V).transpose(1, 2)
        k = torch.cat((kv[..., :N], r[:, None].expand(-1, H, -1, -1)), dim=-1)
        scores = torch.tanh(q @ k.mT * 0.7 / 5.0) * 5.0 + bias
        return torch.softmax(scores, -1) @ kv[..., N:]

    args = (*inputs(), torch.randn(B, H, 1, S, dtype=torch.float64).masked_fill(torch.rand(S) < 0.3, -torch.inf))
    result = fuse(fn, args, *MLA)
    assert result.count("mla_absorb") == 1
    assert "scale=0.7" in result.after and "softcap=5.0" in result.after and "bias=%x4" in result.after
    assert_same(fn, args, result)


@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min])
def test_rows_without_keys_stay_as_they_are(fill, heads):
    def fn(q, c, r, w, keep):
        kv = F.linear(c, w).view(B, S, H, N + V).transpose(1, 2)
        k = torch.cat((kv[..., :N], r[:, None].expand(-1, H, -1, -1)), dim=-1)
        return torch.softmax(torch.where(keep, q @ k.mT * 0.3, fill), -1) @ kv[..., N:]

    keep = torch.rand(B, heads, 1, S) < 0.5
    keep[1] = False
    args = (*inputs(torch.float32), keep)
    result = fuse(fn, args, *MLA)
    assert result.count("mla_absorb") == 1
    assert_same(fn, args, result)


def test_latents_and_rotary_keys_may_be_used_elsewhere():
    def fn(q, c, r, w):
        c, r = c.sin(), r.cos()
        return spelled.written(q, c, r, w), c, r, c.sum()

    result = fuse(fn, inputs(), *MLA)
    assert result.count("mla_absorb") == 1
    assert_same(fn, inputs(), fuse(fn, inputs(), *MLA))


def test_a_weight_may_be_shared():
    def fn(q, c, r, w):
        return spelled.written(q, c, r, w), spelled.written(q, c.sin(), r, w), F.linear(c[:, 0], w)

    args = inputs()
    result = fuse(fn, args, *MLA)
    assert result.count("mla_absorb") == 2
    assert_same(fn, args, result)


def test_tokens_may_come_in_front_of_batches():
    def fn(q, c, r, w):
        kv = F.linear(c.transpose(0, 1), w).view(S, B, H, N + V).permute(1, 2, 0, 3)
        k = torch.cat((kv[..., :N], r[:, None].expand(-1, H, -1, -1)), dim=-1)
        return F.scaled_dot_product_attention(q, k, kv[..., N:])

    args = inputs()
    result = fuse(fn, args, *MLA)
    assert result.count("mla_absorb") == 1
    assert_same(fn, args, result)


def test_the_parts_are_a_value_for_others():
    q, c, r, w = inputs()
    with torch.no_grad():
        unit = capture.trace(spelled.written, (q, c, r, w))
    normalize(unit)
    record = CompileRecord()
    run_patterns(unit, ALL.only(*MLA).without("mla_absorb"), Options.resolve(None, {}, {}), record)
    facts = GraphFacts(unit.gm, ())
    (attention,) = unit.gm.graph.find_nodes(op="call_function", target=torch.ops.ascend.flash_attention.default)
    found = find_latent(facts, attention)
    names = dict(zip("qcrw", unit.gm.graph.find_nodes(op="placeholder"), strict=True))
    assert found.latent.node.args[0] is names["c"] and found.rope.node is names["r"] and found.q is names["q"]
    assert found.latent.shape == (B, 1, S, RANK) and found.rope.shape == (B, 1, S, P)
    assert found.w_uk.weight is found.w_uv.weight is names["w"]
    assert (found.w_uk.part, found.w_uv.part) == ((0, N), (N, N + V)) and found.w_uk.heads == H
    assert (found.nope, found.roped) == ((0, N), (N, N + P)) and found.attention.kwargs["scale"] == 0.4


def test_snapshot():
    one = inputs(torch.bfloat16, b=1)
    snapshot("mla_absorb", fuse(spelled.written, one, *MLA), fuse(spelled.written, inputs(), *MLA))


def _keys_of(k_nope, r, q, v):
    return F.scaled_dot_product_attention(q, torch.cat((k_nope, r[:, None].expand(-1, H, -1, -1)), dim=-1), v)


def _split(c, w):
    kv = F.linear(c, w).view(B, S, H, N + V).transpose(1, 2)
    return kv[..., :N], kv[..., N:]


def no_rotary_part(q, c, r, w):
    k, v = _split(c, w)
    return F.scaled_dot_product_attention(q[..., :N], k, v)


def rotary_key_per_head(q, c, r, w):
    k, v = _split(c, w)
    own = torch.stack([r * i for i in range(H)], 1)
    return F.scaled_dot_product_attention(q, torch.cat((k, own), -1), v)


def values_of_other_latents(q, c, r, w):
    return _keys_of(_split(c, w)[0], r, q, _split(c.sin(), w)[1])


def latents_per_head(q, c, r, w):
    own = torch.stack([c, c.sin(), c.cos()], 1)
    k = torch.einsum("bhsr,hnr->bhsn", own, w.view(H, N + V, RANK)[:, :N])
    return _keys_of(k, r, q, _split(c, w)[1])


def biased(q, c, r, w):
    kv = F.linear(c, w, w[:, 0]).view(B, S, H, N + V).transpose(1, 2)
    return _keys_of(kv[..., :N], r, q, kv[..., N:])


def keys_used_too(q, c, r, w):
    k, v = _split(c, w)
    return _keys_of(k, r, q, v), k.sum()


def heads_inside(q, c, r, w):
    kv = F.linear(c, w).view(B, S, N + V, H).permute(0, 3, 1, 2)
    return _keys_of(kv[..., :N], r, q, kv[..., N:])


def activated(q, c, r, w):
    k, v = _split(c, w)
    return _keys_of(k.relu(), r, q, v)


NEAR = [
    (no_rotary_part, "op", "cat([nope, rope], -1)"),
    (rotary_key_per_head, "shape", "that all heads share"),
    (values_of_other_latents, "arg", "the same latents"),
    (latents_per_head, "op", "a linear of the latents"),
    (biased, "arg", "one with a bias"),
    (keys_used_too, "users", "also used by"),
    (heads_inside, "shape", "head by head"),
    (activated, "op", "a linear of the latents"),
]


@pytest.mark.parametrize(("fn", "code", "found"), NEAR, ids=lambda p: getattr(p, "__name__", None))
def test_near_misses_say_what_stopped_them(fn, code, found):
    args = inputs()
    result = fuse(fn, args, *MLA)
    missed = result.missed("mla_absorb")
    assert result.count("mla_absorb") == 0 and missed.code == code and found in missed.reason, missed
    assert_same(fn, args, result)


@pytest.mark.parametrize(
    ("sq", "keys", "fires"), [(1, S, True), (1, 3, True), (1, 2, False), (S, S, False), (8, S, False)]
)
def test_it_must_pay(sq, keys, fires):
    q, c, r, w = inputs(sq=sq)
    args = (q, c[:, :keys].clone(), r[:, :keys].clone(), w)
    result = fuse(spelled.written, args, *MLA)
    assert result.count("mla_absorb") == fires
    if not fires:
        assert result.missed("mla_absorb").code == "cost"


@pytest.mark.parametrize("sq", [1, 2, 5])
def test_the_bound_is_where_the_count_is_halved(sq):
    """The formula of the docstring, against the multiplications counted on both sides of the bound."""
    bound = mla_absorb.keys_from_which_it_pays(sq, nope=128, value=96, rank=512, rope=64)

    def ratio(keys):
        expanding = keys * 512 * (128 + 96) + sq * keys * (128 + 64 + 96)
        return expanding / (sq * 512 * (128 + 96) + sq * keys * (2 * 512 + 64))

    assert ratio(bound) >= mla_absorb.GAIN > ratio(bound - 1)


def test_for_many_queries_there_is_no_bound():
    assert mla_absorb.keys_from_which_it_pays(4096, nope=128, value=128, rank=512, rope=64) is None


def test_symbolic_queries_are_refused():
    q, c, r, w = inputs(sq=4)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = [DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    fake = mode.from_tensor(q, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    with torch.no_grad():
        unit = capture.trace(spelled.written, [fake, c, r, w], fake_mode=mode)
    normalize(unit)
    record = CompileRecord()
    run_patterns(unit, ALL.only(*MLA), Options.resolve(None, {"strict": True}, {}), record)
    missed = max((m for m in record.missed if m.pattern == "mla_absorb"), key=lambda m: m.progress)
    assert record.count("mla_absorb") == 0 and missed.code == "cost"
