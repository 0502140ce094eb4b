"""benchmarks/kv.py: its rows, its drawn caches, what it calls copied, written and wasted. No time is judged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _harness as h
import _kv
import _kv_caches as caches
import _kv_long as long
import _kv_probe as probe
import _kv_waste as waste
import _models
import kv


def small() -> torch.nn.Module:
    return _models.build("tiny-qwen3", dtype=torch.bfloat16, check=False)


def case_of(**more):
    return {"kind": "step", "model": "tiny-qwen3", "batch": 2, "context": 40, "layers": 2, "dtype": "bf16", **more}


def test_rows_have_names_and_fit_or_are_left_out():
    rows = kv.cases()
    labels = [kv.label(c) for c in rows]
    assert len(labels) == len(set(labels)) and "step qwen3-0.6b 16x128 28L" in labels
    sizes = {c: kv.token_bytes("qwen3-0.6b") * c["batch"] * c["context"] * c["layers"] for c in map(Frozen, rows)}
    assert kv.token_bytes("qwen3-0.6b") == 2 * 8 * 128 * 2 and kv.token_bytes("ds3-small") == (512 + 64) * 2
    assert max(sizes.values()) <= kv.SHARE
    assert [kv.label(c) for c in rows if not c["layers"]] == ["step qwen3-0.6b 16x32768 0L"]
    assert "ours-packed" in kv.contenders_of(rows[0]) and "ours-packed" not in kv.contenders_of({"kind": "attention"})


class Frozen(dict):
    """A case that can be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(kv.label(self))


@pytest.mark.parametrize("kind", ["dynamic", "static", "paged"])
def test_every_cache_holds_the_same_tokens_and_is_rewound(kind: str):
    config = small().config
    cache = caches.make(kind, config, 2, 40)
    caches.fill(cache, config, 2, 40)
    want = list(caches.tokens(config, 2, 40))
    assert want[0][0].unique().numel() > 200 and not torch.equal(want[0][0], want[1][0])
    for layer, (keys, values) in enumerate(want):
        new = torch.zeros(2, 2, 1, 128, dtype=torch.bfloat16)
        got = cache.update(new, new, layer)
        assert torch.equal(got[0][:, :, :40], keys) and torch.equal(got[1][:, :, :40], values)
    assert caches.length(cache) == 41
    caches.rewind(cache, 40)
    assert caches.length(cache) == 40 and len(caches.buffers(cache)) == 4
    assert caches.allocated(caches.buffers(cache)) >= 2 * 40 * caches.shape_of(config).token_bytes


def test_drawn_values_are_exact_in_every_dtype():
    a = caches.draw((3, 5, 7), 1)
    assert torch.equal(a.float(), caches.draw((3, 5, 7), 1, torch.float32)) and a.min() >= -2 and a.max() < 2


def test_allocations_of_kv_size_and_time_in_events_are_found():
    x = torch.ones(1 << 16)

    def call():
        with torch.profiler.record_function(probe.APPEND):
            y = torch.cat([x, x])
        return y + 1

    seen = probe.trace(call)
    assert seen.copied(8 << 16) == 2 * (8 << 16) and seen.copied(9 << 16) == 0
    assert 0 < seen.seconds(probe.APPENDS) < seen.seconds(probe.re.compile(probe.STEP))
    nested = probe.Trace((("kv_write", 0.0, 10.0), ("index_put_", 2.0, 3.0), ("one step", 0.0, 40.0)), ())
    assert nested.seconds(probe.APPENDS) == pytest.approx(1e-5) and nested.share(probe.APPENDS) == pytest.approx(0.25)


def test_writes_count_what_changed_and_what_moved():
    kept = [torch.zeros(4, 8), torch.zeros(4, 8)]

    def call():
        kept[0][2] = 1
        kept[1] = kept[1].clone()

    done = probe.writes(call, lambda: kept)
    assert done == probe.Writes(moved=1, changed=32)


@torch.no_grad()
def test_eager_contenders_agree_and_are_looked_at():
    dynamic, static = (_kv.prepare(case_of(context=400), c) for c in ("hf-dynamic", "hf-static"))
    assert dynamic.reference is not None
    assert h.difference(dynamic.run().float(), static.run().float()) < 0.02
    dynamic.reset()
    assert h.difference(dynamic.run().float(), dynamic.reference().float()) < 0.1
    layer = 2 * 2 * 128 * 2  # bytes of a token's keys and values of two sequences in one layer, halved
    assert static.notes["copied"] == 0 and static.notes["moved"] == 0
    assert static.notes["changed"] == 2 * 2 * layer
    assert dynamic.notes["moved"] == 4 and dynamic.notes["graphs"] == 0
    assert dynamic.notes["copied"] > 2 * 400 * layer and 0 < dynamic.notes["append_share"] < 1


@torch.no_grad()
def test_attention_alone_agrees_too():
    runs = [_kv.prepare(case_of(kind="attention"), c).run().float() for c in ("hf-dynamic", "hf-static")]
    assert runs[0].shape == (2, 2, 1, 4, 128) and h.difference(*runs) < 0.01


def test_pages_waste_less_than_a_page_and_padding_much():
    queue = waste.requests(40)
    rows = waste.padded(queue, 8)
    for size in (1, 16, 64):
        pages = waste.paged(queue, size, 8)
        assert pages.worst < size and pages.orphans == pages.left == 0
        assert 1 <= pages.factor < rows.factor
    assert waste.padded([waste.Request(10, 2)] * 4, 4).factor == pytest.approx((12 + 12) / (11 + 12))


def test_long_sequences_are_scaled_and_wrong_tokens_are_seen():
    assert long.lengths(False) == _models.LONG_SEQUENCES and max(long.lengths(True)) == 2048
    torch.manual_seed(0)
    exact = torch.randn(3, 2, 50)
    eager = exact + 0.004 * torch.randn_like(exact)
    assert long.disagreements(exact + 0.004 * torch.randn_like(exact), exact, eager) == 0
    wrong = exact.clone()
    wrong[1, 0] = exact[1, 1]
    assert long.disagreements(wrong, exact, eager) == 1


def test_the_summary_takes_the_worst_row():
    rows = []
    for copied, factor in ((0, 2.0), (5, 1.1)):
        row = h.Row(case_of(batch=16), {c: h.Timing(rounds=[1.0]) for c in kv.CONTENDERS})
        row.timings["hf-static"].rounds = [factor]
        for c in kv.CONTENDERS:
            row.timings[c].notes = {"copied": copied, "moved": 0, "append_share": 0.01, "allocated": 1, "resident": 1}
        rows.append(row)
    values, goals = kv.summary(rows)
    assert values["kv_copied_bytes"] == 5 and values["step_vs_hf_static"] == 1.1 and goals["kv_copied_bytes"] == 0
    assert values["append_share"] == 0.01 and values["agreed"] == "2/2"
    assert kv._line(rows[0])[-1] == "yes" and kv._memory_line(rows[0])[1] == "0 0 0"
