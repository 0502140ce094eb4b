"""A cache that grows: the same values as concatenation, and few copies of old tokens."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from pattern_support import assert_same, fuse, snapshot

from ascend_dynamo.backend import Backend
from ascend_dynamo.dialect.kv_append import SPARE

tf.logging.set_verbosity_error()
append = torch.ops.ascend.kv_append
B, H, S, D = 2, 3, 8, 4
RAISED = ("sdpa", "eager_attention", "kv_append")


def tokens(n=1, b=B):
    return torch.randn(b, H, n, D)


def joined(past, new):
    return torch.cat((past, new), -2)


def test_few_old_tokens_are_copied():
    ours = theirs = tokens(5)
    copied, steps, address = 0, 2000, None
    for _ in range(steps):
        new = tokens()
        ours, theirs = append(ours, new), joined(theirs, new)
        if ours.data_ptr() != address:
            copied, address = copied + theirs.shape[2] - 1, ours.data_ptr()
    assert torch.equal(ours, theirs)
    assert copied < 3 * steps, f"{copied} old tokens for {steps} new ones"
    assert ours.untyped_storage().nbytes() <= 1.5 * ours.numel() * 4 + SPARE * B * H * D * 4


def test_strides_do_not_tell_of_length_or_room():
    past = append(tokens(5), tokens())
    assert {append(past, tokens(n)).stride() for n in (1, 3, 400)} == {(H * D, D, B * H * D, 1)}


def test_a_fork_is_two_caches():
    past = append(tokens(5), tokens())
    a, b = tokens(), tokens(2)
    first, second = append(past, a), append(past, b)
    assert torch.equal(first, joined(past, a)) and torch.equal(second, joined(past, b))
    longer = append(first, b), append(second, a)
    assert torch.equal(longer[0], joined(joined(past, a), b)) and torch.equal(longer[1], joined(joined(past, b), a))
    assert first.data_ptr() == past.data_ptr() != second.data_ptr()


def test_older_results_stay_as_they_were():
    results = [append(tokens(3), tokens())]
    kept = [results[0].clone()]
    for n in (1, 2, 300, 1):
        results.append(append(results[-1], tokens(n)))
        kept.append(results[-1].clone())
    assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :, :-2],
        lambda x: x[:, :, 2:],
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x[:1],
        lambda x: x[:, 1:],
        lambda x: x[..., 1:],
        lambda x: x[:, :, ::2],
        lambda x: x.repeat_interleave(2, 0),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.flip(2),
        lambda x: x.double(),
        lambda x: x[:, :, :0],
        lambda x: x[:1].expand(4, -1, -1, -1),
        copy.deepcopy,
    ],
)
def test_cropped_reordered_repeated(change):
    whole = append(tokens(6), tokens())
    past = change(whole)
    kept = whole.clone(), past.clone()
    new = torch.randn(past.shape[0], past.shape[1], 1, past.shape[3]).to(past.dtype)
    got = append(past, new)
    assert torch.equal(got, joined(past, new)) and got.stride()[-1] == 1
    assert torch.equal(append(whole, tokens())[:, :, :-1], kept[0]) and torch.equal(past, kept[1])
    assert torch.equal(got, joined(kept[1], new))


def test_the_end_of_a_window_goes_on_in_place():
    past, plain = append(tokens(6), tokens()), None
    plain = past.clone()
    addresses = set()
    for _ in range(30):
        new = tokens()
        whole, plain = append(past, new), joined(plain, new)
        assert torch.equal(whole, plain)
        past, plain = whole[:, :, 1:], plain[:, :, 1:]
        addresses.add(whole.untyped_storage().data_ptr())
    assert len(addresses) == 1


def test_two_threads_continue_one_cache():
    past = append(tokens(3), tokens())
    found: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        found[i] = append(past, torch.full((B, H, 1, D), float(i)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(y, joined(past, torch.full((B, H, 1, D), float(i)))) for i, y in found.items())


def test_inference_mode_and_out_of_it():
    with torch.inference_mode():
        inner = append(tokens(3), tokens())
    new = tokens()
    outer = append(inner, new)
    assert torch.equal(outer, joined(inner, new)) and not outer.is_inference()
    with torch.inference_mode():
        assert torch.equal(append(outer, new), joined(outer, new))


@pytest.mark.parametrize(
    ("past", "new", "said"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), "axes"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 1, 4).double(), "convert"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 1, 1, 4), "more than their tokens"),
    ],
)
def test_errors(past, new, said):
    with pytest.raises(ValueError, match=said):
        append(past, new)


def grown(q, k, v, old_k, old_v):
    k, v = joined(old_k, k), joined(old_v, v)
    return F.scaled_dot_product_attention(q, k, v), k, v


def window(q, k, v, old_k, old_v):
    k, v = joined(old_k, k), joined(old_v, v)
    return F.scaled_dot_product_attention(q, k, v), k[:, :, 1:], v[:, :, 1:]


def forgotten(q, k, v, old_k, old_v):
    return grown(q, k, v, old_k, old_v)[0]


def no_attention(q, k, v, old_k, old_v):
    return joined(old_k, k)


def overwritten(q, k, v, old_k, old_v):
    y = grown(q, k, v, old_k, old_v)
    old_k.zero_()
    old_v.zero_()
    return y


def of_a_change(q, k, v, old_k, old_v):
    return grown(q, k, v, old_k * 2, old_v * 2)


def three_pieces(q, k, v, old_k, old_v):
    k, v = torch.cat((old_k, k, k), -2), torch.cat((old_v, v, v), -2)
    return F.scaled_dot_product_attention(q, k, v), k, v


def inputs(dtype=torch.float32):
    return [x.to(dtype) for x in (tokens(), tokens(), tokens(), tokens(S), tokens(S))]


@pytest.mark.parametrize("fn", [grown, window], ids=lambda f: f.__name__)
def test_rewritten(fn):
    result = fuse(fn, inputs(), *RAISED)
    assert result.count("kv_append") == 2 and result.ops("aten.cat") == 0
    assert_same(fn, inputs(), result)
    snapshot(f"kv_append_{fn.__name__}", result)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (forgotten, "returned"),
        (no_attention, "attention"),
        (overwritten, "a write by"),
        (of_a_change, "an input"),
        (three_pieces, "past, new"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_left_alone(fn, reason):
    result = fuse(fn, inputs(), *RAISED)
    assert result.count("kv_append") == 0
    if fn is not three_pieces:  # too far from it to be a near miss
        assert reason in result.missed("kv_append").reason
    if fn is not overwritten:  # whose arguments change when it runs
        assert_same(fn, inputs(), result)


def test_parameters_are_no_caches():
    assert fuse(grown, inputs(), *RAISED, params=(3, 4)).count("kv_append") == 0


def loop(fn, change=lambda x, i: x, count=6):
    """``fn`` called step by step with what it returned as the past."""
    k, v = tokens(S), tokens(S)
    torch.manual_seed(1)
    found = []
    for i in range(count):
        y, k, v = fn(tokens(b=k.shape[0]), tokens(b=k.shape[0]), tokens(b=k.shape[0]), k, v)
        found.append((y, k.clone(), v.clone()))
        k, v = change(k, i), change(v, i)
    return found


def compiled(fn, dynamic=None, **options):
    torch._dynamo.reset()
    own = Backend({"target": "reference", "strict": True, **options})
    return torch.compile(fn, backend=own, dynamic=dynamic, fullgraph=True), own


@pytest.mark.parametrize("fn", [grown, window], ids=lambda f: f.__name__)
def test_steps_are_bitwise_those_of_eager(fn):
    with torch.no_grad():
        run, own = compiled(fn)
        for seed in (0, 1):  # two caches
            torch.manual_seed(seed)
            want = loop(fn)
            torch.manual_seed(seed)
            for a, b in zip(want, loop(run), strict=True):
                for x, y in zip(a, b, strict=True):
                    torch.testing.assert_close(y, x, rtol=0, atol=0)
    # the first length, all others, and caches made by eager code, which lie in memory in another way
    assert len(own.records) <= 3 and all(r.count("kv_append") == 2 and r.kv_copies == [] for r in own.records)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, i: x[torch.tensor([1, 0])] if i == 2 else x,
        lambda x, i: x[:, :, :-2] if i == 2 else x,
        lambda x, i: x.repeat_interleave(2, 0) if i == 2 else x,
    ],
    ids=["reordered", "cropped", "more sequences"],
)
def test_steps_after_a_change_of_the_cache(change):
    with torch.no_grad():
        run, own = compiled(grown)
        torch.manual_seed(0)
        want = loop(grown, change)
        torch.manual_seed(0)
        for a, b in zip(want, loop(run, change), strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(y, x, rtol=0, atol=0)
    assert all(r.count("kv_append") == 2 for r in own.records)


def test_it_can_be_switched_off():
    with torch.no_grad():
        run, own = compiled(grown, patterns={"kv_append": False})
        run(*inputs())
    (record,) = own.records
    assert record.count("kv_append") == 0 and len(record.kv_copies) == 2


def test_a_model_decodes_as_eager_does():
    """A DynamicCache that was reordered on the way, and forked: both continuations are right."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = tf.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=61, max_position_embeddings=128)
    net = tf.Qwen2ForCausalLM(config).eval()
    torch._dynamo.reset()
    own = Backend({"target": "reference", "strict": True})
    run = torch.compile(net, backend=own)

    def steps(call):
        cache, x, found = tf.DynamicCache(config=config), torch.arange(10).view(2, 5) * 3, []
        for i in range(8):
            found.append(call(input_ids=x, past_key_values=cache, use_cache=True).logits[:, -1])
            x = found[-1].argmax(-1, keepdim=True)
            if i == 5:
                cache.reorder_cache(torch.tensor([1, 0]))
            if i == 4:
                fork = tf.DynamicCache(config=config)
                fork.update(cache.layers[0].keys, cache.layers[0].values, 0)
                fork.layers[0].keys, fork.layers[0].values = cache.layers[0].keys, cache.layers[0].values
                found.append(call(input_ids=x + 1, past_key_values=fork, use_cache=True).logits[:, -1])
        return found

    with torch.no_grad():
        for a, b in zip(steps(net), steps(run), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
    assert [r.count("kv_append") for r in own.records[:3]] == [0, 2, 2]
    assert all(r.kv_copies == [] for r in own.records)
