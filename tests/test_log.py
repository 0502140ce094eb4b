"""Log levels from the environment, and warnings said once per owner."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from ascend_dynamo import log
from ascend_dynamo.errors import OptionError


@pytest.fixture
def untouched() -> Iterator[logging.Logger]:
    """The package's logger, put back afterwards."""
    root, area = logging.getLogger(log.ROOT), logging.getLogger("ascend_dynamo.match")
    handlers, levels = root.handlers[:], (root.level, area.level)
    yield root
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    area.setLevel(levels[1])


def test_areas_and_signs() -> None:
    assert log.parse("+match, normalize,-lowering.cpu,all") == {
        "ascend_dynamo.match": logging.DEBUG,
        "ascend_dynamo.normalize": logging.INFO,
        "ascend_dynamo.lowering.cpu": logging.ERROR,
        "ascend_dynamo": logging.INFO,
    }
    assert log.parse("") == {}


@pytest.mark.parametrize("bad", ["+", "match normalize", "++match", "a..b"])
def test_nonsense_is_refused_and_named(bad: str) -> None:
    with pytest.raises(OptionError, match="ASCEND_DYNAMO_LOGS"):
        log.parse(bad)


def test_setup_sets_levels_and_adds_one_handler(untouched: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untouched, "propagate", False)
    before = len(untouched.handlers)
    log.setup({})
    assert len(untouched.handlers) == before
    log.setup({"ASCEND_DYNAMO_LOGS": "+match"})
    log.setup({"ASCEND_DYNAMO_LOGS": "+match"})
    assert logging.getLogger("ascend_dynamo.match").level == logging.DEBUG
    assert len(untouched.handlers) == before + 1


def test_once_says_each_message_once_per_owner(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("ascend_dynamo.test")
    first, second = log.Once(), log.Once()
    assert first.warning(logger, "graph %d", 1)
    assert not first.warning(logger, "graph %d", 1)
    assert first.warning(logger, "graph %d", 2)
    assert second.warning(logger, "graph %d", 1)
    assert [r.getMessage() for r in caplog.records] == ["graph 1", "graph 2", "graph 1"]
