"""Progress of a long command: a bar on a terminal, a log line every tenth elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TextIO

log = logging.getLogger("ascend_dynamo.progress")


class Progress:
    """``with Progress(total, "fuzz") as p: p.step("rms_norm")``; writes to ``stream`` (default: stderr)."""

    def __init__(self, total: int, label: str, *, stream: TextIO | None = None, width: int = 30) -> None:
        self.total, self.label, self.width = max(total, 1), label, width
        self.stream = sys.stderr if stream is None else stream
        self.done = 0
        self._bar = self.stream.isatty()
        self._start = time.monotonic()
        self._longest = 0

    def __enter__(self) -> Progress:
        self._draw("")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self.stream.write("\r" + " " * self._longest + "\r")
            self.stream.flush()

    def step(self, what: str = "", n: int = 1) -> None:
        """``n`` more units are done; ``what`` names the one that was just finished."""
        before = self.done
        self.done = min(self.total, self.done + n)
        if self._bar:
            self._draw(what)
        elif self.done * 10 // self.total > before * 10 // self.total:
            log.info("%s", self._text(what))

    def _text(self, what: str) -> str:
        seconds = time.monotonic() - self._start
        return f"{self.label}: {self.done}/{self.total}, {seconds:.0f} s{', ' + what if what else ''}"

    def _draw(self, what: str) -> None:
        if not self._bar:
            return
        full = self.width * self.done // self.total
        line = f"\r[{'#' * full}{'.' * (self.width - full)}] {self._text(what)}"[:120]
        self.stream.write(line.ljust(self._longest))
        self.stream.flush()
        self._longest = max(self._longest, len(line))
