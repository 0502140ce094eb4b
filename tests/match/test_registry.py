"""Registries as values, their digests, plugins by entry point and by option, and ill-formed declarations."""

from __future__ import annotations

import importlib
from importlib import metadata

import pytest
import torch
from match_support import RELU_ADD, SAME, fused, ops, relu_add

from ascend_dynamo.contracts import Domain
from ascend_dynamo.errors import PatternError
from ascend_dynamo.match import Registry, declare, load_registry
from ascend_dynamo.options import Options
from ascend_dynamo.report.records import CompileRecord


def pattern(name="p", **kwargs):
    return declare(name, **{"eager": relu_add, "replace": fused, "domain": SAME, **kwargs})


def test_registries_are_values():
    a, b, c = pattern("a"), pattern("b"), pattern("c")
    r = Registry([a, b])
    assert (r + Registry([c])).names == ("a", "b", "c") and r.names == ("a", "b")
    assert r.without("a").names == ("b",) and r.only("b").names == ("b",)
    assert "a" in r and r["a"] is a and len(r) == 2 and list(r) == [a, b]
    assert (r + r).names == ("a", "b")  # the same pattern twice is one
    with pytest.raises(PatternError, match='no pattern "d"; there are: a, b'):
        r.without("d")


def test_two_patterns_of_one_name_are_refused():
    with pytest.raises(PatternError, match='two patterns are named "a"'):
        Registry([pattern("a"), pattern("a")])


def test_cycles_of_before_and_after_are_named():
    with pytest.raises(PatternError, match="cycle: a -> b"):
        Registry([pattern("a", before=("b",)), pattern("b", before=("a",))])


def test_the_digest_follows_what_patterns_do():
    def other(x, y):
        return torch.relu(y + x)

    eps = 1e-6

    def make(bound):
        return Registry([pattern(replace=lambda x, y: ops.fused(x, y, bound))]).digest()

    base = Registry([pattern()]).digest()
    assert base == Registry([pattern()]).digest()
    different = [
        Registry([pattern(version=2)]),
        Registry([pattern(eager=other)]),
        Registry([pattern(level=1)]),
        Registry([pattern(domain=Domain(dims={"H": (1, None)}, shapes=SAME.shapes))]),
        Registry([pattern(domain=Domain(shapes=SAME.shapes, requires=lambda m, f: None))]),
    ]
    assert len({base, *(r.digest() for r in different)}) == 6
    assert make(eps) != make(1e-5)  # closures count


def test_declarations_that_disagree_are_refused_by_name():
    with pytest.raises(PatternError, match=r"spelling 0 \(relu_add\) takes \(x, y\) but replace .* takes \(x, z\)"):
        pattern(replace=lambda x, z: ops.fused(x, z))
    with pytest.raises(PatternError, match='"y" has no shape in domain'):
        pattern(domain=Domain(shapes={"x": ("*B", "H")}))
    with pytest.raises(PatternError, match='"z" is declared'):
        pattern(domain=Domain(shapes={**SAME.shapes, "z": ("H",)}))
    with pytest.raises(PatternError, match="which is no size"):
        pattern(domain=Domain(shapes={"x": ("*B", "H H"), "y": ("H",)}))
    with pytest.raises(PatternError, match="two runs of axes"):
        pattern(domain=Domain(shapes={"x": ("*B", "*C"), "y": ("H",)}))
    with pytest.raises(PatternError, match="level is 0 to 3"):
        pattern(level=7)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"replace": lambda x, y: (ops.fused(x, y), x)}, "returns 1 tensors, but the replacement returns 2"),
        ({"replace": lambda x, y: ops.fused(x, y).sum(-1)}, r"but the replacement gives torch.float32 \[5\]"),
        ({"replace": lambda x, y: ops.fused(x, y).double()}, "but the replacement gives torch.float64"),
        ({"eager": lambda x, y: torch.relu(x + y) * hash(tuple(x.shape))}, "varies and is no expression"),
        ({"eager": lambda x, y: torch.relu(x + y) + torch.ones(3)}, "tracing failed"),
        ({"eager": lambda x, y: x}, "nothing to match"),
    ],
)
def test_faults_that_tracing_finds(change, complaint):
    with pytest.raises(PatternError, match=complaint):
        pattern(**change).alternatives(torch.float32)


def test_a_scalar_that_only_the_replacement_knows_is_an_error():
    p = declare(
        "unbound",
        eager=lambda x, y, s: torch.relu(x + y),
        replace=lambda x, y, s: ops.fused(x, y, s),
        domain=SAME,
        scalars={"s": (0.1, 2.0)},
    )
    with pytest.raises(PatternError, match="needs s, which cannot be read off"):
        p.alternatives(torch.float32)


class Entry:
    def __init__(self, name, load):
        self.name, self.value, self.load = name, f"pkg:{name}", lambda: load


@pytest.fixture
def installed(monkeypatch):
    points = []
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    return points


def test_plugins_by_entry_point_and_by_option(installed):
    installed += [
        Entry("zeta", lambda: [pattern("z")]),
        Entry("builtin", lambda: Registry([RELU_ADD])),
        Entry("alpha", [pattern("a")]),
    ]
    record = CompileRecord()
    found = load_registry(Options(plugins=(pattern("mine"), Registry([pattern("yours")]))), record)
    assert found.names == ("relu_add", "a", "z", "mine", "yours") and not record.quarantined


def test_a_faulty_plugin_is_left_out_and_named(installed):
    def raises():
        raise ImportError("no module named kernels")

    installed += [
        Entry("builtin", lambda: [RELU_ADD]),
        Entry("broken", raises),
        Entry("odd", lambda: [42]),
        Entry("taken", lambda: [pattern("relu_add")]),
        Entry("type", lambda: [type(RELU_ADD)]),
    ]
    record = CompileRecord()
    assert load_registry(Options(), record).names == ("relu_add",)
    errors = {q.pattern: q.error for q in record.quarantined}
    assert "no module named kernels" in errors["plugin broken (pkg:broken)"]
    assert "no pattern: it lacks" in errors["plugin odd (pkg:odd)"]
    assert 'the name "relu_add" is taken' in errors["plugin taken (pkg:taken)"]
    assert "is a class; give an instance" in errors["plugin type (pkg:type)"]
    with pytest.raises(PatternError, match="plugin broken"):
        load_registry(Options(strict=True))


def test_groups_name_a_pattern_and_all_that_emit_an_op():
    from ascend_dynamo.patterns import registry

    groups = registry().groups
    assert set(groups["flash_attention"]) == {"sdpa", "eager_attention"}
    assert groups["sdpa"] == ("sdpa",) and "rms_norm" in groups["rms_norm"] and len(groups["rms_norm"]) > 1


def test_the_digest_of_a_recogniser_covers_its_package(tmp_path, monkeypatch):
    package = tmp_path / "recognisers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("LIMIT = 1\n")
    source = "from ascend_dynamo.match import ProceduralPattern\nclass P(ProceduralPattern):\n    name = 'p'\n"
    (package / "one.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    pattern = importlib.import_module("recognisers.one").P()
    before = Registry([pattern]).digest()
    assert before == Registry([pattern]).digest()
    (package / "helper.py").write_text("LIMIT = 2\n")
    assert before != Registry([pattern]).digest()
