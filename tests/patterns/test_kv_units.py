"""Caches behind attentions: every way of writing them is one unit, and what is not provably one says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from pattern_support import ALL
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ascend_dynamo import capture
from ascend_dynamo.backend import Backend
from ascend_dynamo.contracts import NoMatch
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.match import run_patterns
from ascend_dynamo.normalize import normalize
from ascend_dynamo.options import Options
from ascend_dynamo.patterns.attention.cache import KVUnit, describe_units, find_units
from ascend_dynamo.report.records import CompileRecord

tf.logging.set_verbosity_error()
B, H, S, D = 2, 3, 8, 4
FLASH = torch.ops.ascend.flash_attention.default


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def units(fn, *args, fake_mode=None):
    """The units of each attention of ``fn(*args)``, after the attentions were raised; and the graph."""
    with torch.no_grad():
        unit = capture.trace(fn, args, fake_mode=fake_mode)
    normalize(unit)
    run_patterns(
        unit, ALL.only("sdpa", "eager_attention"), Options.resolve(None, {"strict": True}, {}), CompileRecord()
    )
    facts = GraphFacts(unit.gm, unit.params)
    found = [find_units(facts, n) for n in unit.gm.graph.find_nodes(op="call_function", target=FLASH)]
    assert found, "no attention was recognised"
    return found, unit.gm.graph


def inputs(new=1, kv=H, past=S):
    """q, new k and v, old k and v."""
    q = torch.randn(B, H, new, D)
    return (q, *(torch.randn(B, kv, new, D) for _ in range(2)), *(torch.randn(B, kv, past, D) for _ in range(2)))


def check(fn, args, kind, *, position=None, length=None, fake_mode=None):
    """Both operands are units of ``kind`` on the inputs 3 and 4 with the tokens of the inputs 1 and 2."""
    (found,), graph = units(fn, *args, fake_mode=fake_mode)
    inputs = graph.find_nodes(op="placeholder")
    for name, base, new in (("k", inputs[3], inputs[1]), ("v", inputs[4], inputs[2])):
        unit = found[name]
        assert isinstance(unit, KVUnit), str(unit)
        assert unit.kind == kind and unit.base is base and unit.new is new, str(unit)
        assert position is None or unit.position == position
        assert length is None or unit.length == length
    assert kind in describe_units(found)[0]
    return found


def appended(q, k, v, old_k, old_v):
    k, v = torch.cat((old_k, k), -2), torch.cat((old_v, v), -2)
    return attend(q, k, v), k, v


def test_dynamic():
    found = check(appended, inputs(), "dynamic", position=S, length=S + 1)
    assert found["k"].store.op == "output" and found["k"].axes == ("d0", "d1", "d2", "d3")


def test_dynamic_with_grouped_heads_and_another_layout():
    def fn(q, k, v, old_k, old_v):
        k, v = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
        heads = [x.transpose(1, 2)[:, :, None].expand(B, 2, 3, x.shape[1], D).flatten(1, 2) for x in (k, v)]
        return attend(q, *heads), k, v

    q = torch.randn(B, 6, 1, D)
    args = (q, *(torch.randn(B, n, 2, D) for n in (1, 1, S, S)))
    assert check(fn, args, "dynamic", position=S)["k"].axes == ("d0", "d2", "d1", "d3")


def test_dynamic_heads_in_one_axis():
    def fn(q, k, v, old_k, old_v):
        k, v = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
        return attend(q, *(x.view(B, -1, H, D).transpose(1, 2) for x in (k, v))), k, v

    args = (torch.randn(B, H, 1, D), *(torch.randn(B, n, H * D) for n in (1, 1, S, S)))
    assert check(fn, args, "dynamic")["v"].axes == ("d0", "d2.0", "d1", "d2.1")


def test_dynamic_of_symbolic_length():
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = [DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    q, k, v, old_k, old_v = inputs()
    olds = [mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)) for x in (old_k, old_v)]

    def fn(q, k, v, old_k, old_v):
        torch._check(old_k.shape[2] == old_v.shape[2])
        return appended(q, k, v, old_k, old_v)

    found = check(fn, (q, k, v, *olds), "dynamic", fake_mode=mode)
    assert isinstance(found["k"].length, torch.SymInt) and not isinstance(found["k"].position, torch.fx.Node)


def indexed(q, k, v, old_k, old_v, at):
    old_k.index_copy_(2, at, k)
    old_v.index_copy_(2, at, v)
    return attend(q, old_k, old_v)


def by_index_put(q, k, v, old_k, old_v, at):
    old_k[:, :, at] = k
    old_v[:, :, at] = v
    return attend(q, old_k, old_v)


def cloned_on_the_way(q, k, v, old_k, old_v, at):
    old_k.index_copy_(2, at, k.clone())
    old_v.index_copy_(2, at, v)
    return attend(q, old_k.clone().contiguous(), old_v.clone())


@pytest.mark.parametrize("fn", [indexed, by_index_put, cloned_on_the_way], ids=lambda f: f.__name__)
def test_static_by_positions(fn):
    found = check(fn, (*inputs(new=2), torch.tensor([4, 5])), "static", length=S)
    assert found["k"].position.op == "placeholder" and found["k"].store.target is torch.ops.aten.copy_.default


def test_static_by_a_computed_position():
    def fn(q, k, v, old_k, old_v, done):
        at = torch.arange(1) + done
        done.add_(1)
        return indexed(q, k, v, old_k, old_v, at)

    assert check(fn, (*inputs(), torch.tensor(3)), "static")["k"].position.target is torch.ops.aten.add.Tensor


@pytest.mark.parametrize("read", [S, 7, 6])
def test_static_by_slices(read):
    def fn(q, k, v, old_k, old_v):
        old_k[:, :, 4:6] = k
        old_v[:, :, 4:6] = v
        return attend(q, old_k[:, :, :read], old_v[:, :, :read])

    check(fn, inputs(new=2), "static", position=4, length=read)


def test_static_as_gpt_fast_has_it():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.k_cache, self.v_cache = nn.Buffer(torch.zeros(B, H, S, D)), nn.Buffer(torch.zeros(B, H, S, D))

        def update(self, at, k, v):
            k_out, v_out = self.k_cache, self.v_cache
            k_out[:, :, at] = k
            v_out[:, :, at] = v
            return k_out, v_out

    cache = Cache()

    def fn(q, k, v, old_k, old_v, at):
        cache.k_cache, cache.v_cache = old_k, old_v
        return attend(q, *cache.update(at, k, v))

    check(fn, (*inputs(), torch.tensor([5])), "static", length=S)


def test_sliding_that_rolls():
    def fn(q, k, v, old_k, old_v):
        new_k, new_v = old_k.roll(-1, dims=-2), old_v.roll(-1, dims=-2)
        last = torch.tensor([-1])
        new_k[:, :, last] = k
        new_v[:, :, last] = v
        old_k.copy_(new_k)
        old_v.copy_(new_v)
        return attend(q, old_k, old_v)

    check(fn, inputs(), "sliding", position=S - 1, length=S)


def test_sliding_that_returns_its_last_tokens():
    def fn(q, k, v, old_k, old_v):
        k, v = torch.cat((old_k, k), -2), torch.cat((old_v, v), -2)
        return attend(q, k, v), k[:, :, 1:], v[:, :, 1:]

    check(fn, inputs(), "sliding", position=S, length=S + 1)


def test_sliding_that_stores_its_last_tokens():
    def fn(q, k, v, old_k, old_v):
        k, v = torch.cat((old_k[:, :, 1:], k), -2), torch.cat((old_v[:, :, 1:], v), -2)
        old_k.copy_(k[:, :, -S:])
        old_v.copy_(v[:, :, -S:])
        return attend(q, k, v)

    check(fn, inputs(new=3), "sliding", position=S - 1, length=S + 2)


def in_place(fn, *args, through_inputs=False):
    """The units of a graph that was captured as it writes, in its middle; the attention reads results or inputs."""
    unit = capture.make_unit(make_fx(fn, tracing_mode="fake")(*args))
    normalize(unit)
    (attention,) = unit.gm.graph.find_nodes(op="call_function", target=FLASH)
    for n in attention.args[1:] if through_inputs else ():
        attention.replace_input_with(n, n.args[0])
    return find_units(GraphFacts(unit.gm), attention), unit.gm.graph.find_nodes(op="placeholder")


@pytest.mark.parametrize("through_inputs", [False, True])
def test_static_written_in_place(through_inputs):
    def fn(q, k, v, old_k, old_v, at):
        new_k, new_v = old_k.index_copy_(2, at, k), torch.ops.aten.index_put_(old_v, [None, None, at], v)
        return FLASH(q, new_k, new_v, scale=0.5)

    found, inputs_ = in_place(fn, *inputs(), torch.tensor([4]), through_inputs=through_inputs)
    for name, base, new in (("k", 3, 1), ("v", 4, 2)):
        assert isinstance(found[name], KVUnit), str(found[name])
        assert found[name].base is inputs_[base] and found[name].new is inputs_[new]
        assert found[name].store is found[name].write


def test_written_in_place_behind_a_read_or_twice():
    def early(q, k, v, old_k, old_v, at):
        total = old_k.sum()
        old_k.index_copy_(2, at, k)
        return FLASH(q, old_k, old_v.index_copy_(2, at, v), scale=0.5), total

    def late(q, k, v, old_k, old_v, at):
        y = FLASH(q, old_k, old_v.index_copy_(2, at, v), scale=0.5)
        return y, old_k.index_copy_(2, at, k)

    def twice(q, k, v, old_k, old_v, at):
        old_k.index_copy_(2, at, k)
        y = FLASH(q, old_k, old_v.index_copy_(2, at, v), scale=0.5)
        return y, old_k.zero_()

    for fn, code in ((early, "alias"), (late, "alias"), (twice, "mutation")):
        found, _ = in_place(fn, *inputs(), torch.tensor([4]))
        assert isinstance(found["k"], NoMatch) and found["k"].code == code, str(found["k"])


def test_two_layers_have_their_own_caches():
    def fn(q, k, v, a, b, c, d, at):
        first = indexed(q, k, v, a, b, at)
        return indexed(first, k * 2, v * 2, c, d, at)

    q, k, v, a, b = inputs()
    found, graph = units(fn, q, k, v, a, b, a.clone(), b.clone(), torch.tensor([1]))
    bases = [u.base for one in found for u in one.values()]
    assert bases == graph.find_nodes(op="placeholder")[3:7] and all(describe_units(one) for one in found)


def test_keys_that_are_joined_of_two_caches():
    def fn(q, latent, rope, old_latent, old_rope):
        latent, rope = torch.cat((old_latent, latent), 2), torch.cat((old_rope, rope), 2)
        return attend(q, torch.cat((latent, rope), -1), latent), latent, rope

    args = (torch.randn(B, 1, 1, 6), *(torch.randn(B, 1, n, d) for n, d in ((1, 4), (1, 2), (S, 4), (S, 2))))
    (found,), graph = units(fn, *args)
    _, latent, rope, old_latent, old_rope = graph.find_nodes(op="placeholder")
    assert {name: (u.base, u.new) for name, u in found.items()} == {
        "k.0": (old_latent, latent),
        "k.1": (old_rope, rope),
        "v": (old_latent, latent),
    }
    assert describe_units(found) == ("kv cache (dynamic): old tokens are read and written only here",)


def two_writers(q, k, v, old_k, old_v, at):
    old_k[:, :, at + 1] = k * 2
    return indexed(q, k, v, old_k, old_v, at)


def written_behind_the_read(q, k, v, old_k, old_v, at):
    y = attend(q, old_k, old_v)
    old_k.index_copy_(2, at, k)
    old_v.index_copy_(2, at, v)
    return y


def other_axis(q, k, v, old_k, old_v, at):
    old_k.index_copy_(1, torch.arange(H), old_k * 2)
    old_v.index_copy_(2, at, v)
    return attend(q, old_k, old_v)


def joined_along_heads(q, k, v, old_k, old_v, at):
    k = torch.cat((old_k[:, :1], old_k[:, 1:] * 2), 1)
    return attend(q, k, old_v), k


def stale(q, k, v, old_k, old_v, at):
    before = old_k * 1
    old_k.index_copy_(2, at, k)
    return attend(q, before, old_v)


def old_tokens_used_too(q, k, v, old_k, old_v, at):
    return indexed(q, k, v, old_k, old_v, at) + 0 * old_v.sum(), old_k.sum()


def old_tokens_read_first(q, k, v, old_k, old_v, at):
    total = old_k.sum()
    return indexed(q, k, v, old_k, old_v, at), total


def a_copy_is_written(q, k, v, old_k, old_v, at):
    own_k, own_v = old_k.clone(), old_v.clone()
    return indexed(q, k, v, own_k, own_v, at)


def a_part_is_read(q, k, v, old_k, old_v, at):
    old_k.index_copy_(2, at, k)
    old_v.index_copy_(2, at, v)
    return attend(q, old_k[:, :, :6], old_v[:, :, :6])


def the_wrong_part_is_read(q, k, v, old_k, old_v, at):
    old_k[:, :, 5:6] = k
    old_v[:, :, 5:6] = v
    return attend(q, old_k[:, :, 1:5] * 1, old_v[:, :, :4])


def new_tokens_cut_off(q, k, v, old_k, old_v, at):
    k, v = torch.cat((old_k, k), -2), torch.cat((old_v, v), -2)
    return attend(q, k, v), k[:, :, :-1], v[:, :, :-1]


def new_tokens_first(q, k, v, old_k, old_v, at):
    k, v = torch.cat((k * 2, old_k), -2), torch.cat((v * 2, old_v), -2)
    return attend(q, k, v), k, v


def forgotten(q, k, v, old_k, old_v, at):
    return appended(q, k, v, old_k, old_v)[0]


def added(q, k, v, old_k, old_v, at):
    torch.ops.aten.index_put_(old_k, [None, None, at], k, True)
    old_v.index_copy_(2, at, v)
    return attend(q, old_k, old_v)


def kept_elsewhere(q, k, v, old_k, old_v, at):
    k, v = old_k.index_copy(2, at, k), old_v.index_copy(2, at, v)
    return attend(q, k, v), k, v


def one_cache_for_both(q, k, v, old_k, old_v, at):
    k, v = torch.cat((old_k, k), -2), torch.cat((old_k, v), -2)
    return attend(q, k, v), k, v


def rolled_too_far(q, k, v, old_k, old_v, at):
    new_k = old_k.roll(-2, dims=-2)
    new_k[:, :, torch.tensor([-1])] = k
    old_k.copy_(new_k)
    return attend(q, old_k, old_v)


def in_the_middle(q, k, v, old_k, old_v, at):
    new_k = old_k.roll(-1, dims=-2)
    new_k[:, :, torch.tensor([3])] = k
    old_k.copy_(new_k)
    return attend(q, old_k, old_v)


def written_after_too(q, k, v, old_k, old_v, at):
    y = indexed(q, k, v, old_k, old_v, at)
    old_k.mul_(0.5)
    return y


NEAR = [
    (two_writers, "mutation", "another by"),
    (written_behind_the_read, "op", "behind the read"),
    (other_axis, "arg", "axis 1"),
    (joined_along_heads, "arg", "axis 1"),
    (stale, "op", "as it was"),
    (old_tokens_read_first, "alias", "reads it too"),
    (a_copy_is_written, "op", "forgotten"),
    (a_part_is_read, "unproven", "tokens 0 to 6"),
    (the_wrong_part_is_read, "op", ""),
    (new_tokens_cut_off, "op", "forgotten"),
    (new_tokens_first, "op", "first"),
    (forgotten, "op", "forgotten"),
    (added, "arg", "accumulate"),
    (kept_elsewhere, "mutation", "kept elsewhere"),
    (one_cache_for_both, "alias", "reads it too"),
    (rolled_too_far, "arg", "[-2]"),
    (in_the_middle, "arg", "another place"),
    (written_after_too, "mutation", "another by"),
]


@pytest.mark.parametrize(("fn", "code", "reason"), NEAR, ids=lambda p: getattr(p, "__name__", None))
def test_what_is_not_proven_says_why(fn, code, reason):
    (found, *_), _ = units(fn, *inputs(), torch.tensor([4]))
    why = found["k"]
    assert isinstance(why, NoMatch) and why.code == code and reason in str(why), str(why)
    assert describe_units(found) == ()


def test_reads_behind_the_write_do_no_harm():
    (found,), _ = units(old_tokens_used_too, *inputs(), torch.tensor([4]))
    assert all(isinstance(u, KVUnit) for u in found.values()), [str(u) for u in found.values()]


CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
}
CASES = [
    ("llama", "dynamic", 6, {"dynamic"}),
    ("llama", "static", 6, {"static"}),
    ("mistral", "dynamic", 10, {"sliding"}),
    ("mistral", "static", 6, {"static"}),
    ("mistral", "static", 10, {"sliding"}),
    ("gemma2", "static", 10, {"static", "sliding"}),
    ("gemma3_text", "dynamic", 10, {"dynamic", "sliding"}),
]


@pytest.mark.parametrize(("family", "cache", "prompt", "kinds"), CASES)
@torch.no_grad()
def test_caches_of_transformers(family, cache, prompt, kinds):
    """One step of decoding: each attention has a unit, which the compile record tells."""
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if family.startswith("gemma") else {}
    config = tf.AutoConfig.for_model(family, **CONFIG, **layers)
    config._attn_implementation = "eager" if family == "gemma2" else "sdpa"
    model = tf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    kv = tf.DynamicCache(config=config) if cache == "dynamic" else tf.StaticCache(config=config, max_cache_len=16)
    tokens = torch.randint(1, 64, (1, prompt + 1))
    model(tokens[:, :prompt], past_key_values=kv, use_cache=True)
    backend = Backend({"target": "reference", "strict": True})
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(tokens[:, prompt:], past_key_values=kv, use_cache=True)
    (record,) = backend.records
    said = [a for f in record.fired for a in f.assumes if a.startswith("kv cache")]
    assert record.count("flash_attention") == len(said) == 2
    assert {kind for kind in ("dynamic", "static", "sliding") for a in said if f"({kind})" in a} == kinds


def test_why_an_attention_has_no_cache_is_told():
    from pattern_support import fuse

    def told(fn):
        result = fuse(fn, [*inputs(), torch.tensor([4])], "sdpa")
        (fired,) = [f for f in result.record.fired if f.pattern == "sdpa"]
        return [a for a in fired.assumes if "kv cache" in a]

    assert told(indexed) == ["kv cache (static): old tokens are read and written only here"]
    (why,) = told(kept_elsewhere)
    assert why.startswith("no kv cache: mutation:") and "kept elsewhere" in why
    assert told(lambda q, k, v, old_k, old_v, at: attend(q, k * 2, v)) == []
