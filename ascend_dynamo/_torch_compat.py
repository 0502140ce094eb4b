"""Every private torch API that Ascend Dynamo touches, behind a name of our own. Tested on torch 2.13; 2.11 to 2.14."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ascend_dynamo.errors import UnsupportedTorchError

OLDEST, NEWEST = (2, 11), (2, 14)


def check_torch_version(version: str = torch.__version__) -> None:
    """Refuse a torch that is too old.

    Raises:
        UnsupportedTorchError: torch is older than 2.11; the message says what to install.
    """
    major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    if (major, minor) < OLDEST:
        raise UnsupportedTorchError(
            f"ascend_dynamo needs torch {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, found {version}: "
            "pip install 'torch==2.13.0' (or another release in that range)"
        )


def detect_fake_mode(values: Any) -> Any:
    """The FakeTensorMode of the first fake tensor in ``values``, or None."""
    from torch._dynamo.utils import detect_fake_mode as detect

    return detect(values)


def mark_static_sizes(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """Sizes of ``tensor`` (of the given dims, else all) that stay numbers even under ``dynamic=True``."""
    for dim in dims or range(tensor.dim()):
        torch._dynamo.mark_static(tensor, dim)
    return tensor


def known(relation: Any) -> bool:
    """True if a bool or SymBool is statically known to be true. Never adds a guard."""
    if isinstance(relation, bool):
        return relation
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(relation)


def guard_count(fake_mode: Any) -> int:
    """How many guards the shape environment holds; passes must not change it."""
    env = getattr(fake_mode, "shape_env", None)
    return 0 if env is None else len(env.guards)


def aot_compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    decompositions: dict[Any, Any] | None = None,
) -> Callable[..., Any]:
    """AOTAutograd around ``compiler`` for inference: functional graph, input mutations kept as a copy_ epilogue."""
    import torch._functorch.config as functorch_config
    from torch._dynamo.backends.common import aot_autograd

    with functorch_config.patch(enable_autograd_cache=False, unlift_effect_tokens=True):
        return aot_autograd(
            fw_compiler=compiler,
            inference_compiler=compiler,
            decompositions=decompositions or {},
            keep_inference_input_mutations=True,
        )(gm, example_inputs)


def static_input_indices() -> tuple[int, ...]:
    """Which inputs of the graph under compilation are parameters, buffers or marked static (else empty)."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fw_metadata is None:
        return ()
    return tuple(context.fw_metadata.static_input_indices)


def storage_use_count(tensor: torch.Tensor) -> int:
    """How many tensors and Python wrappers hold the storage of ``tensor``, this call's own wrapper not counted."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1


def version_of(tensor: torch.Tensor) -> int:
    """The in-place version counter; -1 for inference tensors, which have none."""
    return -1 if tensor.is_inference() else tensor._version


def inductor_decompositions() -> dict[Any, Any]:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def retrace(
    gm: fx.GraphModule,
    interpreter: Callable[[fx.GraphModule], fx.Interpreter],
    values: Sequence[Any],
    decompositions: dict[Any, Any],
) -> fx.GraphModule:
    """Trace ``gm`` again through an interpreter and a decomposition table, keeping each node's provenance."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    mode = detect_fake_mode(values)
    with mode or contextlib.nullcontext(), enable_python_dispatcher(), preserve_node_meta(), torch.no_grad():
        values = _each_its_own(values)
        return make_fx(
            interpreter(gm).run,
            decomposition_table=decompositions,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*values)


def _each_its_own(values: Sequence[Any]) -> list[Any]:
    """``values`` with no tensor in it twice: make_fx takes two arguments that are one tensor for one placeholder."""
    seen: set[int] = set()
    own = []
    for v in values:
        if isinstance(v, torch.Tensor):
            if id(v) in seen:
                v = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
            seen.add(id(v))
        own.append(v)
    return own


def inductor_compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], static_inputs: Sequence[int]
) -> Callable[[list[Any]], list[Any]]:
    """Inductor's joint passes and inner compiler on an inference graph; returns a boxed callable.

    Inductor's own pattern matcher stays off in the joint passes: its attention patterns are unsound (softmax over
    another dim, alpha, masks that are not 0/1) and ours have run already. Random ops follow eager's generator.
    """
    import torch._inductor.config as inductor_config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx_inner
    from torch._inductor.virtualized import V

    values = [n.meta.get("val") for n in gm.graph.find_nodes(op="placeholder")]
    fake_mode = detect_fake_mode([*values, *example_inputs]) or torch._subclasses.FakeTensorMode(
        allow_non_fake_inputs=True
    )
    with V.set_fake_mode(fake_mode), inductor_config.patch(fallback_random=True):
        with inductor_config.patch(pattern_matcher=False):
            gm = _recursive_joint_graph_passes(gm)
        output = next(iter(gm.graph.find_nodes(op="output")))
        outputs = output.args[0] if isinstance(output.args[0], (list, tuple)) else output.args
        output.meta["user_visible_output_idxs"] = [i for i, o in enumerate(outputs) if isinstance(o, fx.Node)]
        return compile_fx_inner(gm, example_inputs, static_input_idxs=tuple(static_inputs), is_inference=True)


def inductor_compile_training(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Stock Inductor, for graphs that need gradients: none of our capture or passes takes part."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs))  # type: ignore[return-value]  # a callable unless asked for AOTInductor


def eager_training(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """AOTAutograd with gradients and no compiler (the reference target's training path)."""
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(gm, list(example_inputs))


@contextlib.contextmanager
def no_dispatch_modes() -> Iterator[None]:
    """Leave every active dispatch mode, so that real tensors can be computed during compilation."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def is_fake(value: Any) -> bool:
    from torch._subclasses import FakeTensor

    return isinstance(value, FakeTensor)


def trace_functional(fn: Callable[..., Any], fakes: Sequence[Any], mode: Any) -> fx.GraphModule:
    """make_fx over fake tensors with no decompositions."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with mode, torch.no_grad():
        return make_fx(fn, decomposition_table={}, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)


def isolated_compile_kwargs() -> dict[str, Any]:
    """Arguments that give one ``torch.compile`` call Dynamo cache entries of its own (torch >= 2.13)."""
    name = "isolate_recompiles"
    return {name: True} if name in inspect.signature(torch.compile).parameters else {}


def graph_break_reasons() -> Counter[str]:
    """Why Dynamo has cut graphs so far in this process, with counts."""
    from torch._dynamo.utils import counters

    return Counter(counters["graph_break"])


def sym_expr(value: Any) -> Any:
    """The sympy expression of a SymInt or SymBool (with the replacements known so far); other values unchanged."""
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)) else value


def shape_env_of(value: Any) -> Any:
    """The shape environment behind a symbolic value, a fake tensor or a fake mode, or None."""
    if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
        return value.node.shape_env
    mode = getattr(value, "fake_mode", value)
    return getattr(mode, "shape_env", None)


def known_sympy(relation: Any, shape_env: Any) -> bool:
    """True if a sympy relation is statically known to be true in ``shape_env``. Never adds a guard."""
    if shape_env is None:
        return bool(relation == True)  # noqa: E712  (sympy's BooleanTrue is not True)
    return bool(shape_env._maybe_evaluate_static(relation) == True)  # noqa: E712


def no_new_guards(shape_env: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, an operation that would add a guard raises instead, and the shape environment stays as it was."""
    enter = getattr(shape_env, "error_on_new_guards", contextlib.nullcontext)
    return enter()


def is_guard_error(error: BaseException) -> bool:
    """True for the error of ``no_new_guards``, also where an operator's error wraps it."""
    while error is not None:
        if type(error).__name__ == "_ShapeEnvGuardError" or "Guard attempted while" in str(error):
            return True
        error = error.__cause__  # type: ignore[assignment]
    return False


def sympy_functions() -> dict[str, Any]:
    """Torch's own sympy functions by name: FloorDiv, Mod, PythonMod, CleanDiv, Max, Min, ..."""
    from torch.utils._sympy import functions

    names = ("FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "Mod", "PythonMod", "ModularIndexing", "Max", "Min")
    return {name: getattr(functions, name) for name in names}


def size_hint(size: Any) -> int:
    """A plausible value of a size for heuristics; never adds a guard."""
    if isinstance(size, int):
        return size
    node = size.node
    return int(node.hint) if node.has_hint() else 1 << 20


def redispatch_below_autograd(op: Any, keyset: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call the next kernel of ``op`` after autograd; for Autograd kernels registered with ``with_keyset=True``."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)


def never_compile_frame(fn: Callable[..., Any]) -> None:
    """Run by eager code, ``fn`` stays eager; inlined into a function that Dynamo traces, it is traced as usual."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(fn.__code__)


def is_subclass(tensor: Any) -> bool:
    """True for DTensor, quantised and other wrapper subclasses, which AOTAutograd takes apart."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return is_traceable_wrapper_subclass(tensor)


def is_restart(error: BaseException) -> bool:
    """True for the exceptions by which AOTAutograd asks Dynamo to trace again; they must reach Dynamo."""
    from torch._dynamo.exc import RestartAnalysis, TensorifyScalarRestartAnalysis

    return isinstance(error, (RestartAnalysis, TensorifyScalarRestartAnalysis))


def plain_inference(gm: fx.GraphModule, example_inputs: Sequence[Any], *, eager: bool) -> Callable[..., Any]:
    """Compile an inference graph without any of our passes: by Inductor's inner compiler, or run op by op."""

    def compiler(captured: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if not eager:
            return inductor_compile(captured, inputs, static_input_indices())

        def run(args: list[Any]) -> Any:
            return captured(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return aot_compile(gm, example_inputs, compiler, None if eager else inductor_decompositions())


def symbolic_fakes(
    tensors: Sequence[torch.Tensor], axes: Sequence[Sequence[int]] | None = None
) -> tuple[Any, list[Any]]:
    """A fake mode with a shape environment, and fakes whose sizes above 1 are symbols (equal sizes share one).

    ``axes`` names the symbolic axes of each tensor; by default all are.
    """
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    if axes is None:
        return mode, [mode.from_tensor(t, static_shapes=False) for t in tensors]
    fakes = []
    for t, symbolic in zip(tensors, axes, strict=True):
        sizes = [DimDynamic.DUCK if d in symbolic else DimDynamic.STATIC for d in range(t.dim())]
        fakes.append(mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
    return mode, fakes


def privateuse1_name() -> str:
    """The device type of the out-of-tree backend: "npu" once torch_npu is imported, else "privateuseone"."""
    return torch._C._get_privateuse1_backend_name()


def specialize_module_floats(gm: fx.GraphModule) -> None:
    """Ask Dynamo to trace again with floats of modules and globals (eps, math.pi) as constants, if they are inputs.

    ``dynamic=True`` makes them inputs, which would hide every eps from the patterns. Floats that the caller passes as
    arguments stay inputs. Uses the restart by which AOTAutograd specialises floats that it cannot keep.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    wanted: set[str] = set()
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        memo = getattr(node.meta.get("example_value"), "item_memo", None)
        if source is None or memo is None or not all(user.target == "item" for user in node.users):
            continue
        kind = source.guard_source
        if kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module() or not kind.is_local():
            wanted.add(str(memo.node._expr))
    wanted = {name for name in wanted if not TensorifyState.should_specialize(name)}
    if wanted:
        for name in sorted(wanted):
            TensorifyState.specialize(name)
        raise TensorifyScalarRestartAnalysis


@contextlib.contextmanager
def function_mode_left(mode: Any) -> Iterator[None]:
    """Take ``mode`` off the torch-function stack inside the block, if it is the innermost one.

    While it is there, every attribute of every tensor goes through its handler, which the passes would feel.
    """
    depth = torch._C._len_torch_function_stack()
    if depth == 0 or torch._C._get_function_stack_at(depth - 1) is not mode:
        yield
        return
    torch._C._pop_torch_function_stack()
    try:
        yield
    finally:
        torch._C._push_on_torch_function_stack(mode)


def symbol_range(symbol: Any, shape_env: Any) -> tuple[int, int | None]:
    """The range of a size symbol, inclusive; an upper end of None is no bound."""
    found = None if shape_env is None else shape_env.var_to_range.get(symbol)
    if found is None:
        return 0, None
    low = int(found.lower) if found.lower.is_Integer else 0
    return max(low, 0), int(found.upper) if found.upper.is_Integer else None


def symbol_source(symbol: Any, shape_env: Any) -> str:
    """Where Dynamo found a size, in the words of the traced code (``L['x'].size()[1]``), or ""."""
    sources = {} if shape_env is None else getattr(shape_env, "var_to_sources", {})
    found = sources.get(symbol)
    if not found:
        return ""
    name = found[0].name  # a method before torch 2.12
    return str(name() if callable(name) else name)


def inductor_program(compiled: Any) -> tuple[str, list[tuple[int, str]]]:
    """The Python program that Inductor wrote for a graph (also where its cache had it; "" if there is none), and the
    stack traces of the user's code by line of that program."""
    source, lines = getattr(compiled, "source_code", None), getattr(compiled, "cache_linemap", None)
    return source if isinstance(source, str) else "", [(n, trace) for n, trace in lines or () if trace]
