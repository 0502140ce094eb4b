"""What a compiled graph will allocate, by the best source that its target has."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.memory.generated import UnreadableProgramError, read_program
from ascend_dynamo.memory.lifetimes import Liveness
from ascend_dynamo.memory.liveness import liveness

log = logging.getLogger("ascend_dynamo.memory")


def of_inductor(compiled: Any, gm: fx.GraphModule) -> Liveness:
    """The lifetimes of what Inductor compiled from ``gm``: of the program that it wrote, where that can be read; else
    of ``gm`` itself, which is an upper bound (fusion only removes allocations), and says so (``exact`` is False)."""
    source, lines = compat.inductor_program(compiled)
    try:
        if not source:
            raise UnreadableProgramError("the compiled graph keeps no Python program")
        return read_program(source, gm, lines)
    except UnreadableProgramError as error:
        log.info("memory is predicted from the graph before fusion, an upper bound: %s", error)
        return replace(liveness(gm), exact=False)
