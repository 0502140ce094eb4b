"""What a model will take, known without running it: compiled, and stopped before the first call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.errors import AscendDynamoError, MemoryPlanError
from ascend_dynamo.memory.record import MemoryRecord


class _Compiled(Exception):
    """Everything that was wanted is known."""


def forecast(
    model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> MemoryRecord:
    """Compile ``model`` with dynamic sizes for these example arguments, run nothing, and return its memory record.

    The examples may be small: the record's ``lifetimes()`` evaluate for any sizes. Sizes of 1 stay fixed, and equal
    sizes count as one, so give every size that matters a value of its own. With ``options={"target": "reference"}``
    no kernel is compiled, and the prediction is an upper bound for a target that fuses.

    Raises:
        MemoryPlanError: the target does not tell what it takes.
        AscendDynamoError: what compiling raises; Dynamo's own error where the model is not one graph.
    """
    from ascend_dynamo.backend import Backend

    backend = Backend({"cache": False, "strict": True, "validate": False, **(options or {})})

    def stop(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        backend(gm, inputs)

        def never(*_: Any) -> Any:
            raise _Compiled

        return never

    target = getattr(model, "_orig_mod", model)
    compiled = torch.compile(target, backend=stop, dynamic=True, fullgraph=True, **compat.isolated_compile_kwargs())
    try:
        with torch.no_grad():
            compiled(*args, **kwargs)
    except _Compiled:
        pass
    except AscendDynamoError:
        raise
    except Exception as error:  # Dynamo wraps what a backend raises
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, AscendDynamoError):
            raise inner from error
        raise
    record = backend.records[-1].memory if backend.records else None
    if record is None:
        raise MemoryPlanError("nothing was compiled, or the target does not tell what it takes")
    return record
