"""Random shapes: operators against their formulas, eager kernels against references, fakes against both."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from ascend_dynamo.dialect import SPECS, Draw, Sample
from ascend_dynamo.dialect._paged_checks import batch_of
from ascend_dynamo.dialect.equal import agree, significant_strides

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
SEEDS = st.integers(0, 1000)
LEADS = st.lists(st.integers(0, 5), max_size=3)


def check(name, sample, dtype):
    """Reference and kernel within the budget of the formula, and described exactly by the fake."""
    spec = SPECS[name]
    exact, scale = spec.f64(*sample.args, **sample.kwargs), spec.scale64(*sample.args, **sample.kwargs)
    mode = FakeTensorMode()
    args, kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (sample.args, dict(sample.kwargs)))
    with mode:
        fake = spec.fake(*args, **kwargs)
    # float64 inputs are held to float32 here: compute=float32 is an operator's default
    dtype = torch.float32 if dtype == torch.float64 else dtype
    for fn in (spec.reference, spec.overload):
        result = fn(*sample.args, **sample.kwargs)
        assert agree(result, None, exact, dtype=dtype, c_ulp=spec.c_ulp, row_scale=scale) is None
        for r, f in zip(pytree.tree_leaves(result), pytree.tree_leaves(fake), strict=True):
            assert (r.shape, r.dtype, significant_strides(r)) == (f.shape, f.dtype, significant_strides(f))


@settings(max_examples=25)
@given(
    SEEDS,
    DTYPES,
    LEADS,
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
)
def test_norms(seed, dtype, lead, width, cast, offset):
    d = Draw(seed, dtype)
    x, r, w = d.normal(*lead, width), d.normal(*lead, width), d.normal(width)
    options = {"cast_before_weight": cast, "weight_offset": offset}
    check("rms_norm", Sample((x, w, 1e-6), options), dtype)
    check("add_rms_norm", Sample((x, r, w, 1e-6), options), dtype)
    check("add_layer_norm", Sample((x, r, w, None, 1e-2)), dtype)


@settings(max_examples=25)
@given(SEEDS, DTYPES, LEADS, st.integers(1, 33), st.sampled_from(["none", "tanh"]))
def test_activations(seed, dtype, lead, width, approximate):
    d = Draw(seed, dtype)
    check("swiglu", Sample((d.normal(*lead, 2 * width),)), dtype)
    x, y = d.normal(*lead, width), d.normal(*lead, width)
    for name in ("gelu_add", "gelu_mul", "bias_gelu"):
        check(name, Sample((x, y if name != "bias_gelu" else d.normal(width)), {"approximate": approximate}), dtype)


@settings(max_examples=25)
@given(SEEDS, DTYPES, st.tuples(*[st.integers(1, 4)] * 3), st.integers(1, 8), st.integers(0, 5), st.booleans())
def test_rotary(seed, dtype, lead, pairs, rest, interleaved):
    d = Draw(seed, dtype)
    b, h, s = lead
    width = 2 * pairs
    x, cos, sin = d.normal(b, h, s, width + rest), d.normal(b, 1, s, width), d.normal(s, width)
    options = {"interleaved": interleaved, "rotary_dim": width if rest else -1}
    check("rotary", Sample((x, cos, sin), options), dtype)


@settings(max_examples=40)
@given(
    SEEDS,
    DTYPES,
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(1, 20)),
    st.sampled_from([4, 8, 16]),
    st.sampled_from(["none", "top_left", "bottom_right"]),
    st.integers(-1, 4),
    st.sampled_from([0.0, 3.0]),
    st.sampled_from(["nan", "uniform", "zero"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_flash_attention(seed, dtype, sizes, width, causal, window, softcap, empty_row, given_inputs):
    d = Draw(seed, dtype)
    b, hk, group, sq, sk = sizes
    has_bias, has_mask, has_sinks = given_inputs
    q, k, v = d.normal(b, hk * group, sq, width), d.normal(b, hk, sk, width), d.normal(b, hk, sk, width)
    options = {"scale": width**-0.5, "causal": causal, "window": window, "softcap": softcap, "empty_row": empty_row}
    if has_bias:
        options["bias"] = d.normal(1, 1, sq, sk).masked_fill(~d.bools(sq, sk), -torch.inf)
    if has_mask:
        options["mask"] = d.bools(b, 1, sq, sk)
    if has_sinks:
        options["sinks"] = d.normal(hk * group)
    check("flash_attention", Sample((q, k, v), options), dtype)


@settings(max_examples=25)
@given(
    SEEDS,
    DTYPES,
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(0, 2),
    st.booleans(),
    st.integers(-1, 3),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_paged_and_latent_attention(seed, dtype, extra, padding, causal, window, features):
    d = Draw(seed, dtype)
    lengths = [(queries, queries + more) for queries, more in extra]
    table, starts, lens, tokens = batch_of(d, lengths, 4, 20, padding)
    tokens = max(tokens, 1)
    masked, holes, int8 = features
    if holes:
        table[d.bools(*table.shape, true=0.3)] = -1
    mask = {"mask": d.bools(tokens, int(lens.max()) + padding)} if masked else {}
    k, v = d.normal(20, 4, 2, 8), d.normal(20, 4, 2, 8)
    where = (table, starts, lens)
    options = {"scale": 0.3, "causal": causal, "window": window, **mask}
    if int8:
        scales = {f"{name}_scale": d.uniform(20, 4, 2, low=0.001, high=0.02, dtype=torch.float32) for name in "kv"}
        k8, v8 = (d.ints(20, 4, 2, 8, low=-127, high=128, dtype=torch.int8) for _ in range(2))
        check("paged_attention", Sample((d.normal(tokens, 4, 8), k8, v8, *where), {**options, **scales}), dtype)
    check("paged_attention", Sample((d.normal(tokens, 4, 8), k, v, *where), options), dtype)
    latent = (d.normal(tokens, 2, 8), d.normal(tokens, 2, 4), k[:, :, 0], d.normal(20, 4, 4))
    check("mla_attention", Sample((*latent, *where), {"scale": 0.3, "causal": causal, **mask}), dtype)


@settings(max_examples=25)
@given(
    SEEDS,
    st.lists(st.integers(-1, 15), min_size=1, max_size=6, unique_by=lambda s: s if s >= 0 else object()),
    st.booleans(),
)
def test_cache_writes(seed, slots, int8):
    d = Draw(seed)
    spec = SPECS["kv_write"]
    k, v = d.normal(len(slots), 2, 4), d.normal(len(slots), 2, 4)
    written = []
    for fn in (spec.formula, spec.reference, spec.overload):
        d = Draw(seed)
        if int8:
            caches = [d.ints(4, 4, 2, 4, low=-127, high=128, dtype=torch.int8) for _ in range(2)]
            scales = {f"{name}_scale": d.uniform(4, 4, 2, low=0.1, high=1.0) for name in "kv"}
        else:
            caches, scales = [d.normal(4, 4, 2, 4), d.normal(4, 4, 2, 4)], {}
        fn(k, v, *caches, torch.tensor(slots), **scales)
        written.append([*caches, *scales.values()])
    for other in written[1:]:
        assert all(torch.equal(a, b) for a, b in zip(written[0], other, strict=True))


@settings(max_examples=25)
@given(SEEDS, DTYPES, st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["silu", "gelu"]))
def test_moe(seed, dtype, tokens, groups, top_k, activation):
    d = Draw(seed, dtype)
    experts = groups * 4
    logits = torch.stack([d.permutation(experts) for _ in range(tokens)]).to(dtype) / 8
    options = {"top_k": top_k, "scoring": "sigmoid", "n_group": groups, "topk_group": 1, "normalize": True}
    bias = d.permutation(experts).float() / 1000
    check("moe_gate", Sample((logits, bias), options), dtype)
    ids = torch.stack([d.permutation(experts)[:top_k] for _ in range(tokens)]).to(torch.int32)
    weights = (d.normal(experts, 12, 8), d.normal(experts, 8, 6))
    routed = (d.normal(tokens, 8), d.uniform(tokens, top_k, low=0.0, high=1.0), ids)
    check("moe_experts", Sample((*routed, *weights), {"activation": activation}), dtype)


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 5), st.integers(1, 9), st.integers(1, 4))
def test_quantisation(seed, dtype, tokens, n, blocks):
    d = Draw(seed, dtype)
    k = 8 * blocks
    x, weight = d.normal(tokens, k), d.ints(n, k, low=-127, high=128, dtype=torch.int8)
    channel = d.uniform(n, low=0.001, high=0.02, dtype=torch.float32)
    block = d.uniform(-(-n // 4), blocks, low=0.001, high=0.02, dtype=torch.float32)
    check("dynamic_quant", Sample((x,)), dtype)
    check("swiglu_quant", Sample((d.normal(tokens, 2 * n),)), dtype)
    for options, scale in (
        ({}, channel),
        ({"act": "dynamic"}, channel),
        ({"act": "dynamic", "block_n": 4, "block_k": 8}, block),
        ({"block_n": 4, "block_k": 8}, block),
    ):
        check("quant_linear", Sample((x, weight, scale), options), dtype)


@settings(max_examples=20)
@given(SEEDS, DTYPES, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.data())
def test_gathers_of_pages(seed, dtype, sequences, columns, size, data):
    d = Draw(seed, dtype)
    table = d.ints(sequences, columns, low=-1, high=6, dtype=torch.int32)
    length = data.draw(st.integers(0, columns * size))
    check("kv_gather", Sample((d.normal(6, size, 2, 4), table, length)), dtype)
    codes, scale = d.ints(6, size, 2, 4, low=-127, high=128, dtype=torch.int8), d.uniform(6, size, 2, low=0.0, high=0.1)
    check("kv_gather", Sample((codes, table, length), {"scale": scale}), dtype)
