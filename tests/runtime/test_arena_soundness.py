"""What arenas must not hide or break: unwritten, freed memory, other allocators, oneDNN's scratch; compiled graphs."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_dynamo import Backend, native
from ascend_dynamo.errors import MemoryPlanError
from ascend_dynamo.lowering.reference import ReferenceLowering
from ascend_dynamo.runtime import arena as arena_module
from ascend_dynamo.runtime.arena import Arenas, address_range, holds
from ascend_dynamo.runtime.arena_key import shape_key
from ascend_dynamo.runtime.arena_library import _library

HERE = Path(__file__).parent
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def bytes_of(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_poison_finds_a_read_of_memory_that_nobody_wrote(dtype: torch.dtype) -> None:
    found: list[tuple[bool, bool]] = []

    def program(args: list[Any]) -> list[torch.Tensor]:
        planted = torch.empty(33, dtype=dtype)
        found.append((holds(planted), bool(planted.isnan().all())))
        return [args[0] + planted.sum(), torch.empty(3, dtype=dtype)]

    arenas = Arenas()
    run, plain = arenas.graph(poison=True).around(program), arenas.graph().around(program)
    for _ in range(4):
        total, unwritten = run([torch.zeros((), dtype=dtype)])
        assert total.isnan() and unwritten.isnan().all()
    assert found == [(False, True)] + [(True, True)] * 3  # the recorded call lies on the heap, and is poisoned too
    found.clear()
    for _ in range(2):
        plain([torch.zeros((), dtype=dtype)])
    assert found[1][0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_poison_finds_a_read_of_memory_that_was_freed(dtype: torch.dtype) -> None:
    stale: list[bytes] = []

    def program(args: list[Any]) -> list[torch.Tensor]:
        y = args[0].cos()
        address, size = y.untyped_storage().data_ptr(), y.untyped_storage().nbytes()
        inside = holds(y)
        del y
        if inside:
            stale.append(bytes_of(address, size))
        return [args[0].sum()]

    run = Arenas().graph(poison=True).around(program)
    for _ in range(3):
        run([torch.ones(33, dtype=dtype)])
    assert len(stale) == 2
    for raw in stale:
        freed = torch.frombuffer(bytearray(raw), dtype=dtype)
        assert freed.isnan().all() and raw[:2] == b"\xfe\x7f"


def test_the_memory_of_onednn_comes_and_goes_through_the_allocator() -> None:
    a, b = torch.randn(64, 128).bfloat16(), torch.randn(256, 128).bfloat16()
    convolution = torch.nn.Conv2d(8, 16, 3).bfloat16().eval().requires_grad_(False)
    image = torch.randn(1, 8, 20, 20).bfloat16()

    def program(args: list[Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [torch.nn.functional.linear(a, b).relu(), convolution(image).relu()]

    want = program([])
    run = Arenas().graph(poison=True).around(program)
    for _ in range(4):
        assert all(torch.equal(x, y) for x, y in zip(run([]), want, strict=True))


def test_tensors_grow_and_change_hands_as_ever() -> None:
    stash: list[torch.Tensor] = []

    def program(args: list[Any]) -> list[torch.Tensor]:
        y = args[0].cos()
        y.resize_(4000)  # a new block for an old storage
        y[:1000] = args[0][:1000].cos()
        z = torch._lazy_clone(y) if hasattr(torch, "_lazy_clone") else y.clone()
        z += 1
        args[0].set_(z.clone())  # an input whose storage is now one of the call's blocks
        return [z[:1000] - y[:1000]]

    arenas = Arenas()
    run = arenas.graph().around(program)
    for _ in range(4):
        x = torch.linspace(0, 1, 1000)
        expected = x.cos() + 1 - x.cos()
        assert torch.equal(run([x])[0], expected)
        stash.append(x)
    assert all(torch.equal(s[:1000], stash[0][:1000]) for s in stash)
    assert arenas.stats().shapes[0].replayed == 3


def foreign() -> Path:
    library = _library()
    ((_, flags),) = library.sources
    return native.build(
        native.Library(
            "foreign", "test allocators", "tests", ((HERE / "foreign_allocator.cpp", flags),), (), library.link
        )
    )


def in_a_process(code: str) -> str:
    path = str(foreign())
    before = f"import ctypes, torch\nforeign = ctypes.CDLL({path!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", before + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_declines_where_another_allocator_is_installed() -> None:
    out = in_a_process("""
        foreign.foreign_install()
        from ascend_dynamo import Backend
        from ascend_dynamo.runtime.arena import Arenas, address_range, holds
        arenas = Arenas()
        program = lambda args: [(args[0] + 1) * 2]
        assert arenas.graph().around(program) is program
        assert not holds(torch.ones(3)) and address_range() == (0, 0) and arenas.trim() == 0
        import ascend_dynamo.backend
        from ascend_dynamo.lowering.reference import ReferenceLowering
        class Host(ReferenceLowering):
            def compile(self, g, key=None):
                artifact = super().compile(g, key)
                artifact.host_memory = True
                return artifact
        ascend_dynamo.backend.load_lowering = lambda target: Host()
        backend = Backend({"target": "reference"})
        assert torch.compile(lambda x: x.sin() @ x, backend=backend)(torch.ones(8, 8)).shape == (8, 8)
        notes = [n for n in backend.records[0].notes if "arena" in n]
        print(arenas.stats().reason, notes, backend.memory().reason)
    """)
    assert out.count("another CPU allocator than torch's own is installed") == 3


def test_stays_right_when_another_allocator_comes_later() -> None:
    out = in_a_process("""
        from ascend_dynamo.runtime.arena import Arenas, holds
        arenas = Arenas()
        seen = []
        def program(args):
            y = args[0].cos()
            seen.append(holds(y))
            return [y.sin()]
        run = arenas.graph().around(program)
        x = torch.ones(100)
        for i in range(6):
            if i == 3:
                foreign.foreign_install()
            assert torch.equal(run([x])[0], x.cos().sin())
        print(seen, arenas.stats().reason, arenas.stats().shapes[0].heaped)
        assert arenas.graph().around(program) is program
    """)
    assert out.strip() == f"{[False, True, True, False, False, False]} another CPU allocator was installed over ours 3"


def test_declines_where_torchs_allocator_has_a_priority() -> None:
    out = in_a_process("""
        foreign.foreign_raise()
        from ascend_dynamo.runtime.arena import Arenas
        print(Arenas().reason, Arenas().reason)
        assert (torch.ones(3) + 1).sum() == 6
    """)
    assert out.count("with a priority") == 2


def test_an_address_limit_is_a_reason() -> None:
    out = in_a_process("""
        import resource
        from ascend_dynamo.runtime.arena import Arenas
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, resource.RLIM_INFINITY))
        arenas = Arenas()
        program = lambda args: [(args[0] + 1) * 2]
        assert torch.equal(arenas.graph().around(program)([torch.ones(3)])[0], torch.full((3,), 4.0))
        print(arenas.reason)
    """)
    assert "no address space could be reserved" in out


def test_symbolic_sizes_tell_shapes_apart() -> None:
    from ascend_dynamo import _torch_compat as compat

    _, (x, y) = compat.symbolic_fakes([torch.empty(3, 5), torch.empty(5, 7)])
    a, b, c = x.shape[0], x.shape[1], y.shape[1]
    key = shape_key([a, b, c, x, y])
    assert key is not None and key([3, 5, 7, None, None]) == (3, 5, 7)
    key = shape_key([x, b, y])  # two of the symbols are inputs only through shapes
    assert key is not None and key([torch.empty(2, 9), 9, torch.empty(9, 4)]) == (9, 2, 4)
    key = shape_key([b, torch.empty(3)])
    assert key is not None and key([9, None]) == (9,)
    assert shape_key([torch.empty(3), 4]) is None


def test_a_plan_larger_than_an_arena_leaves_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    arenas = Arenas()
    monkeypatch.setattr(arenas.native, "slot_bytes", lambda: 100)
    run = arenas.graph().around(lambda args: [args[0].cos().sin()])
    for _ in range(3):
        assert torch.equal(run([torch.ones(50)])[0], torch.ones(50).cos().sin())
    (shape,) = arenas.stats().shapes
    assert shape.state == "off" and shape.reason == "200 bytes are more than an arena holds (100)"


def test_where_there_is_no_memory_the_heap_is_asked() -> None:
    """And address space is not used up by asking again."""
    out = in_a_process("""
        import resource
        from ascend_dynamo.runtime.arena import Arenas
        arenas, x = Arenas(), torch.ones(16 << 20)
        run = arenas.graph().around(lambda args: [args[0].cos().sin().sum()])
        run([x])
        with open("/proc/self/status") as status:
            used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + (32 << 20), resource.RLIM_INFINITY))
        for _ in range(80):  # the plan takes 128 MB, this call hardly anything
            assert torch.equal(run([x[:9]])[0], x[:9].cos().sin().sum())
        print(arenas.stats().shapes[0].unleased, arenas.stats().instances)
    """)
    assert out.split() == ["80", "1"]


def test_a_plan_that_cannot_be_made_leaves_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryPlanError("planted")

    monkeypatch.setattr(arena_module, "assign_offsets", refuse)
    arenas = Arenas()
    run = arenas.graph().around(lambda args: [args[0].cos().sin()])
    for _ in range(3):
        assert torch.equal(run([torch.ones(5)])[0], torch.ones(5).cos().sin())
    (shape,) = arenas.stats().shapes
    assert shape.state == "off" and shape.reason == "planted" and shape.heaped == 2


@pytest.mark.slow
def test_compiled_graphs_live_in_the_arena_of_their_backend() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return ((x @ x.T / 64).cos() @ x / 64).tanh()

    backend = Backend({"target": "cpu"})
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for n in (5, 9, 5, 9, 5, 9):
        x = torch.randn(n, 64)
        torch.testing.assert_close(compiled(x), model(x))
    stats, memory = backend.memory(), backend.records[0].memory
    assert {s.key[0] for s in stats.shapes} == {5, 9} and all(s.replayed == 2 for s in stats.shapes)
    assert stats.size == max(s.plan_bytes for s in stats.shapes) > 0 and stats.instances == 1
    assert all(s.last_escaped == 1 and s.last_heap == 0 for s in stats.shapes)
    assert memory is not None and memory.recorded == min(s.peak_bytes for s in stats.shapes)
    assert not any("heap" in note for note in backend.records[0].notes)
    low, high = address_range()
    assert high - low > stats.committed


@pytest.mark.parametrize("arena", ["on", "off", "poison"])
def test_the_option(arena: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a target without a compiler, whose intermediates are torch's own."""

    class Host(ReferenceLowering):
        def compile(self, g: Any, key: Any = None) -> Any:
            artifact: Any = super().compile(g, key)
            artifact.host_memory = True
            return artifact

    monkeypatch.setattr("ascend_dynamo.backend.load_lowering", lambda target: Host())
    backend = Backend({"target": "reference", "arena": arena})

    def program(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() @ x).cos() + torch.empty_like(x)

    run = torch.compile(program, backend=backend)
    x = torch.randn(9, 9)
    for _ in range(3):
        got = run(x)
    assert arena != "poison" or got.isnan().all()
    stats = backend.memory()
    assert len(stats.graphs) == (arena != "off")
    assert all(s.replayed == 2 and s.last_heap == 0 and s.key == () for s in stats.shapes)


def test_a_target_without_host_memory_has_no_arena() -> None:
    backend = Backend({"target": "reference"})
    torch.compile(lambda x: x.sin().cos(), backend=backend)(torch.ones(3))
    assert not backend.memory().graphs and not any("heap" in note for note in backend.records[0].notes)
