"""Hugging Face ``generate()`` through ``ascend_opt``: a compile configuration that compiles on every device.

``generate`` compiles the decode step when it has a static cache and a device of its list; elsewhere it falls back to
eager with one line in the log. Use ``assert_compiled`` where that must not pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ascend_dynamo.backend import Backend
from ascend_dynamo.errors import AscendDynamoError, OptionError

if TYPE_CHECKING:
    from transformers import CompileConfig, PreTrainedModel


def compile_config(
    *,
    backend: Backend | Callable[..., Any] | str | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> CompileConfig:
    """A ``transformers.CompileConfig`` for ``model.generate(..., cache_implementation="static", compile_config=...)``.

    ``options`` are those of ``docs/options.md`` and make a new ``Backend``, which is the config's ``.backend`` and
    keeps ``.records``; or name a ``backend`` (an object, or "ascend_opt") that has its options already. Reuse one
    config for all calls of a model: another one compiles again.

    Raises OptionError for unknown options, or for options beside a ready backend.
    """
    from transformers import CompileConfig

    if backend is not None and options:
        raise OptionError(f"give the options {', '.join(options)} to the backend that you pass, not beside it")
    if backend is None:
        backend = Backend(options)
    config = CompileConfig(fullgraph=fullgraph, dynamic=dynamic, backend=backend, mode=mode, options=None)  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]  # generate() has no public way to compile on a CPU
    return config


def compile_count(config: CompileConfig) -> int:
    """How many graphs the config's ``Backend`` has compiled. TypeError if its backend keeps no records."""
    if not isinstance(config.backend, Backend):
        raise TypeError(f"{config.backend!r} keeps no records: make the config by compile_config(**options)")
    return len(config.backend.records)


def use_grouped_experts(model: PreTrainedModel) -> bool:
    """Let a mixture of experts run as grouped products, which compile into one graph; True if that changed anything.

    transformers' experts_implementation="eager" loops over the experts that were hit: a graph break in every layer. Its
    default "grouped_mm", and "batched_mm", need no call of this: they are recognised as they are.
    """
    found = model.get_experts_implementation()
    if "eager" not in found.values():
        return False
    model.set_experts_implementation({part: "grouped_mm" if how == "eager" else how for part, how in found.items()})
    return True


def use_paged_attention(model: PreTrainedModel) -> str:
    """Let ``model`` run the packed steps of ``PagedRequests``; returns the name of the attention that it had.

    ``model.set_attn_implementation(name)`` gives that back, which ``generate`` needs. docs/kv.md has an example.
    """
    from ascend_dynamo.runtime.kv.interface import NAME, register

    register()
    before: str = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    return before


@contextmanager
def assert_compiled(config: CompileConfig, graphs: int | None = None) -> Iterator[None]:
    """The block must compile: at least one graph, or exactly ``graphs`` (0: everything is warm already).

    Raises AscendDynamoError otherwise, saying why ``generate`` may have stayed in eager.
    """
    before = compile_count(config)
    yield
    done = compile_count(config) - before
    if done == graphs or (graphs is None and done):
        return
    expected = "at least one graph" if graphs is None else f"{graphs} graphs"
    why = ""
    if not done:
        why = (
            "; generate() compiles only the decode step, only with cache_implementation='static' and this"
            " compile_config, and not again for shapes that it has compiled"
        )
    raise AscendDynamoError(f"expected {expected} to be compiled, but {done} were{why}")
