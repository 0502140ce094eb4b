"""The reference and the eager kernel of every operator against its independent float64 formula."""

from __future__ import annotations

import pytest
import torch
from dialect_cases import every_spec, run, samples

from ascend_dynamo.dialect import SPECS, Sample, is_dialect_op, reference_of, spec_of
from ascend_dynamo.dialect.equal import agree

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@every_spec
def test_algebra_in_float64(spec):
    for sample in samples(spec, torch.float64):
        args, kwargs = spec.lift_call(sample.args, sample.kwargs)
        lifted = Sample(args, kwargs)
        exact, scale = run(spec.formula, lifted), spec.scale64(*args, **kwargs)
        for fn in (spec.reference, spec.overload):
            found = agree(run(fn, lifted), None, exact, c_ulp=1.0, row_scale=scale)
            assert found is None, f"{sample.note}: {found}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_spec
def test_rounding_stays_in_the_declared_budget(spec, dtype):
    for seed in (0, 1):
        for sample in samples(spec, dtype, seed):
            exact = run(spec.f64, sample)
            if spec.mutates:
                exact = run(spec.reference, Sample(*spec.lift_call(sample.args, sample.kwargs)))
            scale = spec.scale64(*sample.args, **sample.kwargs)
            for fn in (spec.reference, spec.overload):
                found = agree(run(fn, sample), None, exact, dtype=dtype, c_ulp=spec.c_ulp, row_scale=scale)
                assert found is None, f"{sample.note}: {found}"


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.mutates], ids=lambda spec: spec.name)
def test_writes_are_exactly_the_formulas(spec):
    for sample in samples(spec):
        written = run(spec.formula, sample)
        for fn in (spec.reference, spec.overload):
            for a, b in zip(run(fn, sample), written, strict=True):
                assert torch.equal(a, b), sample.note


def test_judge_gives_a_reason():
    spec = SPECS["rms_norm"]
    sample = samples(spec)[0]
    good = spec.reference(*sample.args, **sample.kwargs)
    assert spec.judge(good, *sample.args, **sample.kwargs) is None
    assert "value at" in str(spec.judge(good * 1.001, *sample.args, **sample.kwargs))


def test_lookup_by_operator():
    op = torch.ops.ascend.swiglu
    assert reference_of(op.default) is reference_of(op) is SPECS["swiglu"].reference
    assert is_dialect_op(op.default) and not is_dialect_op(torch.ops.aten.add.Tensor) and not is_dialect_op(len)
    with pytest.raises(KeyError, match=r"aten\.add\.Tensor is not an operator of the ascend dialect"):
        spec_of(torch.ops.aten.add.Tensor)
    with pytest.raises(TypeError):
        SPECS["x"] = SPECS["swiglu"]


def test_schema_and_python_defaults_are_the_same():
    import inspect

    for spec in SPECS.values():
        for fn in (spec.reference, spec.kernel or spec.reference, spec.formula):
            parameters = inspect.signature(fn).parameters
            for argument in spec.overload._schema.arguments:
                if argument.name in parameters and argument.has_default_value():
                    default = parameters[argument.name].default
                    assert default == argument.default_value or isinstance(default, torch.dtype), (spec.name, argument)


def test_every_operator_is_documented():
    for spec in SPECS.values():
        assert "[" in spec.doc, f"{spec.name} does not give its shapes"


def test_bad_arguments_are_named():
    q = torch.randn(1, 2, 3, 4)
    ops = torch.ops.ascend
    with pytest.raises(ValueError, match="causal='left'"):
        ops.flash_attention(q, q, q, scale=1.0, causal="left")
    with pytest.raises(ValueError, match="scoring='relu'"):
        ops.moe_gate(q[0, 0], None, top_k=1, scoring="relu", normalize=True)
    x, w = torch.randn(2, 4), torch.randint(-9, 9, (3, 4), dtype=torch.int8)
    with pytest.raises(ValueError, match="activation='tanh'"):
        ops.moe_experts(x, x, w, x, x, activation="tanh")
    for options, message in (
        ({"act": "weird"}, "act='weird'"),
        ({"bits": 3}, "bits=3"),
        ({"act": "static"}, "needs x_scale"),
        ({"act": "dynamic", "bits": 4}, "bits=8"),
        ({"act": "static", "x_scale": x[0, :1], "block_k": 2}, "block_k=2"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.quant_linear(x, w, torch.ones(3), **options)
    with pytest.raises(ValueError, match="quantised already"):
        ops.quant_linear(w, w, torch.ones(3))
