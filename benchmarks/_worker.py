"""One contender in its own process: ``python _worker.py MODULE CONTENDER``, driven over stdin and stdout.

Each line in is a JSON object with ``cmd``; each line out is one answer. Commands: ``prepare`` (a case, handed to the
module's ``prepare(case, contender)``), ``reference``, ``time`` (a number of calls), ``close``. What libraries print
goes to stderr, so that it cannot break the protocol.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from _memory import peak_of


@dataclass
class Prepared:
    """What a benchmark's ``prepare`` returns: a call to time and what to know about it.

    ``run`` does one unit of work and returns its result as a tensor; ``reset`` (untimed) precedes each timed batch and
    may be asked for every ``reset_every`` calls. ``work`` holds the row's floor data: bytes, flops. ``reference``
    computes the result in higher precision. ``notes`` are printed with the row.
    """

    run: Callable[[], torch.Tensor]
    reset: Callable[[], None] = lambda: None
    reset_every: int = 1 << 30
    reference: Callable[[], torch.Tensor] | None = None
    work: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def main(module: str, contender: str, commands: TextIO, answers: TextIO) -> None:
    """Serve commands until ``close`` or the end of the input."""
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    bench = importlib.import_module(module)
    prepared: Prepared | None = None
    for line in commands:
        request = json.loads(line)
        if request["cmd"] == "close":
            return
        try:
            if request["cmd"] == "prepare":
                prepared = None
                prepared, answer = _prepare(bench, contender, request)
            else:
                assert prepared is not None, "prepare comes first"
                answer = _reference(prepared, request) if request["cmd"] == "reference" else _time(prepared, request)
        except Exception as error:  # the driver reports it: one contender's failure is a result, not the end
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _prepare(bench: Any, contender: str, request: dict[str, Any]) -> tuple[Prepared, dict[str, Any]]:
    start = time.perf_counter()
    prepared: Prepared = bench.prepare(request["case"], contender)
    prepared.reset()
    with torch.no_grad():
        torch.save(prepared.run().detach().float().clone(), request["output"])
        compile_seconds = time.perf_counter() - start
        prepared.reset()
        prepared.run()
        seconds, peak = peak_of(lambda: _seconds(prepared.run))
    answer = {"compile": compile_seconds, "once": seconds, "work": prepared.work, "notes": prepared.notes, "peak": peak}
    return prepared, {**answer, "has_reference": prepared.reference is not None}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _reference(prepared: Prepared, request: dict[str, Any]) -> dict[str, Any]:
    assert prepared.reference is not None
    prepared.reset()
    with torch.no_grad():
        torch.save(prepared.reference().detach().float().clone(), request["output"])
    return {}


def _time(prepared: Prepared, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each call, CPU seconds of the calls, and CPU seconds of the process in all (resets included)."""
    whole = time.process_time()
    seconds: list[float] = []
    cpu = 0.0
    with torch.no_grad():
        for done in range(request["calls"]):
            if done % prepared.reset_every == 0:
                prepared.reset()
            cpu_start, start = time.process_time(), time.perf_counter()
            prepared.run()
            seconds.append(time.perf_counter() - start)
            cpu += time.process_time() - cpu_start
    return {"seconds": seconds, "cpu": cpu, "process_cpu": time.process_time() - whole}


if __name__ == "__main__":
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.argv[1], sys.argv[2], sys.stdin, protocol)
