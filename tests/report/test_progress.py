"""The progress writer: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest

from ascend_dynamo.report.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_is_wiped():
    out = Terminal()
    with Progress(4, "fuzz", stream=out, width=8) as p:
        p.step("rms_norm", 3)
        p.step("rotary", 5)
    frames = [frame.rstrip() for frame in out.getvalue().split("\r") if frame.strip()]
    assert frames[0].startswith("[........] fuzz: 0/4")
    assert frames[1].startswith("[######..] fuzz: 3/4") and frames[1].endswith("rms_norm")
    assert frames[2].startswith("[########] fuzz: 4/4")
    assert out.getvalue().endswith(" \r")


def test_elsewhere_every_tenth_is_logged(caplog: pytest.LogCaptureFixture):
    out = io.StringIO()
    with caplog.at_level(logging.INFO, "ascend_dynamo.progress"), Progress(40, "sweep", stream=out) as p:
        for n in range(40):
            p.step(f"op{n}")
    assert out.getvalue() == ""
    assert len(caplog.messages) == 10
    assert caplog.messages[-1].startswith("sweep: 40/40, ") and caplog.messages[-1].endswith(", op39")
