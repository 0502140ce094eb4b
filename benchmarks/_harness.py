"""Compare contenders fairly: own processes, in turn, checked for equal results, with the machine's floor beside them.

Each contender is a process with a clean thread environment. They compute the same cases; their results are compared
before anything is timed. Timing goes round by round, contender by contender, so that a slow minute of the machine hits
all of them. A batch is repeated when other processes used the machine, or when the contender did not get its cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import _machine
import torch

THREADS = 2
MAX_FOREIGN = 0.1  # cores that others may use during a batch
MIN_CORES = 0.9  # share of its threads that a contender must keep busy: 1.8 of 2
SHORTEST = 0.3  # seconds of a timed batch
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 1e-3}


def say(text: str = "") -> None:
    """Print to the user, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def clean_environment(threads: int) -> dict[str, str]:
    """The caller's environment without thread settings, with ours; repeatable hashing."""
    drop = ("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "TORCH_LOGS", "TORCHINDUCTOR_MAX_AUTOTUNE", "ASCEND_DYNAMO_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return {**kept, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}


class Process:
    """A contender: a worker process that answers commands in order."""

    def __init__(self, module: str, name: str, log: Path, threads: int) -> None:
        self.name = name
        worker = Path(__file__).with_name("_worker.py")
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(worker), module, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=clean_environment(threads),
            cwd=worker.parent,
        )

    def send(self, cmd: str, **more: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer will say that it died
            self._process.stdin.write(json.dumps({"cmd": cmd, **more}) + "\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer; a process that died answers with an error."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"error": f"process ended with code {self._process.wait()}; see {self._log.name}"}
        return json.loads(line)

    def wait(self) -> None:
        """Until there is an answer to read, or the process has ended."""
        assert self._process.stdout is not None
        select.select([self._process.stdout], [], [])

    def ask(self, cmd: str, **more: Any) -> dict[str, Any]:
        self.send(cmd, **more)
        return self.answer()

    def close(self) -> None:
        self.send("close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@dataclass
class Timing:
    """What one contender did on one case. ``rounds`` holds the median seconds of each round's batch."""

    rounds: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    retries: int = 0
    dirty: int = 0
    compile: float = 0.0
    difference: float = 0.0
    error: str = ""
    peak: float = math.nan  # bytes by which one call raised the process's memory at its highest
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds) if self.rounds else math.nan


@dataclass
class Row:
    """One case: timings by contender, the floor, whether all computed the same."""

    case: dict[str, Any]
    timings: dict[str, Timing] = field(default_factory=dict)
    floor: float = math.nan
    agreed: bool = True

    def ratio(self, against: str, of: str = "ours") -> float:
        """How many times faster ``of`` is than ``against``: the median over rounds of the ratio in that round."""
        a, b = self.timings[against].rounds, self.timings[of].rounds
        pairs = [x / y for x, y in zip(a, b, strict=False)]
        return statistics.median(pairs) if pairs else math.nan

    def reached(self, of: str = "ours") -> float:
        """The share of the floor that a contender reaches (1.0: nothing can be faster)."""
        return self.floor / self.timings[of].median

    @property
    def clean(self) -> bool:
        return self.agreed and not any(t.dirty or t.error for t in self.timings.values())

    def to_dict(self) -> dict[str, Any]:
        timings = {k: {**vars(t), "median": t.median} for k, t in self.timings.items()}
        return {"case": self.case, "floor": self.floor, "agreed": self.agreed, "clean": self.clean, "timings": timings}


class Bench:
    """The driver of one benchmark script: ``module`` is the script's own name, where ``prepare`` lives."""

    def __init__(
        self,
        module: str,
        contenders: Sequence[str],
        *,
        rounds: int,
        machine: _machine.Machine | None,
        threads: int = THREADS,
    ) -> None:
        self.module, self.contenders, self.rounds = module, tuple(contenders), rounds
        self.machine, self.threads = machine, threads
        self._folder = Path(tempfile.mkdtemp(prefix=f"bench-{module}-"))

    @contextlib.contextmanager
    def processes(self) -> Iterator[dict[str, Process]]:
        """Start all contenders; they are closed at the end, whatever happens."""
        running = {c: Process(self.module, c, self._folder / f"{c}.log", self.threads) for c in self.contenders}
        try:
            yield running
        finally:
            for p in running.values():
                p.close()

    def row(self, case: dict[str, Any], running: dict[str, Process], *, in_turn: bool = False) -> Row:
        """Prepare, check and time one case. ``in_turn`` prepares one contender after the other, where several at once
        would not fit into memory."""
        row = Row(case, {c: Timing() for c in running})
        paths = {c: self._folder / f"{c}.pt" for c in running}
        for c, p in running.items():
            p.send("prepare", case=case, output=str(paths[c]))
            if in_turn:
                p.wait()
        ready = {c: p.answer() for c, p in running.items()}
        for c, got in ready.items():
            timing = row.timings[c]
            timing.error = got.get("error", "")
            timing.compile = got.get("compile", 0.0)
            timing.peak = got.get("peak") or math.nan
            timing.notes = got.get("notes", {})
        alive = [c for c in running if not row.timings[c].error]
        if not alive:
            row.agreed = False
            return row
        work = ready[alive[0]]["work"]
        if work and self.machine is not None:
            row.floor = self.machine.floor(bytes_read=work["bytes"], flops=work["flops"], dtype=case["dtype"])
        row.agreed = self._check(case, row, alive, running, ready, paths)
        for _ in range(self.rounds):
            for c in alive:
                self._batch(running[c], row.timings[c], ready[c]["once"])
        return row

    def _check(
        self,
        case: dict[str, Any],
        row: Row,
        alive: list[str],
        running: dict[str, Process],
        ready: dict[str, dict[str, Any]],
        paths: dict[str, Path],
    ) -> bool:
        """Against the reference if there is one, at most twice the first contender's own error; else against it."""
        first = alive[0]
        truth = torch.load(paths[first])
        allowed = TOLERANCE[case["dtype"]]
        if ready[first]["has_reference"]:
            path = self._folder / "reference.pt"
            failed = running[first].ask("reference", output=str(path)).get("error")
            if failed:
                row.timings[first].error = failed
                return False
            truth = torch.load(path)
            allowed = max(allowed, 2 * difference(torch.load(paths[first]), truth))
        for c in alive:
            row.timings[c].difference = difference(torch.load(paths[c]), truth)
        return all(row.timings[c].difference <= allowed for c in alive)

    def _batch(self, p: Process, timing: Timing, once: float, attempts: int = 3) -> None:
        """One timed batch, repeated while the machine was not ours; the last attempt counts, and is marked."""
        calls = max(1, math.ceil(SHORTEST / max(once, 1e-5)))
        for attempt in range(attempts):
            own = time.process_time()
            busy, start = _machine.busy_seconds(), time.perf_counter()
            got = p.ask("time", calls=calls)
            if "error" in got:
                timing.error = got["error"]
                return
            wall = time.perf_counter() - start
            own = time.process_time() - own + got["process_cpu"]
            foreign = max(0.0, _machine.busy_seconds() - busy - own) / wall
            cores = got["cpu"] / sum(got["seconds"])
            good = foreign <= MAX_FOREIGN and cores >= MIN_CORES * self.threads
            if good or attempt == attempts - 1:
                timing.rounds.append(statistics.median(got["seconds"]))
                timing.cores.append(cores)
                timing.foreign.append(foreign)
                timing.dirty += not good
                return
            timing.retries += 1
            time.sleep(0.5)


def difference(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative distance in the 2-norm; infinite if shapes differ or a value is not finite."""
    if got.shape != truth.shape or not bool(torch.isfinite(got).all()):
        return math.inf
    return float((got - truth).norm() / truth.norm().clamp_min(1e-30))


def arguments(description: str | None, more: Callable[[argparse.ArgumentParser], None] | None = None) -> Any:
    """``--quick``, ``--json PATH`` and what ``more`` adds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer and smaller cases")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write everything that was measured there")
    if more is not None:
        more(parser)
    return parser.parse_args()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right."""
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
        for r in (head, *rows)
    )


def geomean(values: Sequence[float]) -> float:
    """Geometric mean; nan of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def describe(machine: _machine.Machine) -> str:
    """The machine in one line."""
    peaks = ", ".join(f"{k} matmul {v / 1e12:.2f} TFLOP/s" for k, v in machine.matmul.items())
    read = f"read {machine.read / 1e9:.1f} GB/s"
    noise = f" (probed while others used {machine.foreign:.1f} cores)" if machine.foreign > MAX_FOREIGN else ""
    return f"{machine.cpu}, {machine.threads} threads, {read}, {peaks}{noise}, torch {torch.__version__}"


def result(name: str, values: dict[str, Any], goals: dict[str, Any], path: Path | None, **everything: Any) -> None:
    """Print the RESULT line; write the JSON file if one was asked for."""
    parts = [f"{k}={_plain(v)}" for k, v in values.items()] + [f"goal:{k}={_plain(v)}" for k, v in goals.items()]
    say(" ".join(["RESULT", name, *parts]))
    if path is not None:
        data = {
            "benchmark": name,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "result": values,
            "goals": goals,
            **everything,
        }
        path.write_text(json.dumps(data, indent=2, default=vars) + "\n")


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
