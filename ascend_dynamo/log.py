"""Logging: loggers below ``ascend_dynamo``, levels from ``ASCEND_DYNAMO_LOGS``, and warnings said once.

The variable reads like TORCH_LOGS: a comma separated list of areas, the modules below ``ascend_dynamo``, with ``+``
for debug, none for info, ``-`` for errors only. ``all`` means the whole package:
``ASCEND_DYNAMO_LOGS="+match,normalize,-lowering"``.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping

from ascend_dynamo.errors import OptionError

ROOT = "ascend_dynamo"
VARIABLE = "ASCEND_DYNAMO_LOGS"
_LEVELS = {"+": logging.DEBUG, "": logging.INFO, "-": logging.ERROR}
_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def parse(text: str) -> dict[str, int]:
    """Logger name -> level. OptionError for an area that cannot be the name of a module."""
    levels = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        sign = part[0] if part[0] in "+-" else ""
        area = part[len(sign) :]
        if not all(piece.isidentifier() for piece in area.split(".")):
            raise OptionError(f'{VARIABLE}: {part!r} is not an area; use areas such as "+match,normalize" or "all"')
        levels[ROOT if area == "all" else f"{ROOT}.{area}"] = _LEVELS[sign]
    return levels


def setup(environ: Mapping[str, str] | None = None) -> None:
    """Set the levels that ``ASCEND_DYNAMO_LOGS`` asks for; without the variable, nothing changes.

    A handler to stderr is added to the package's logger only if nobody has configured logging. Calling it again is
    harmless.
    """
    levels = parse((os.environ if environ is None else environ).get(VARIABLE, ""))
    if not levels:
        return
    root = logging.getLogger(ROOT)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    if not root.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(handler)


class Once:
    """Says each warning once. Each backend owns one, so that backends in one process do not silence each other."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str, tuple[object, ...]]] = set()
        self._lock = threading.Lock()

    def warning(self, log: logging.Logger, message: str, *args: object) -> bool:
        """Log ``message % args`` unless this object has logged the same before; returns whether it did."""
        key = (log.name, message, args)
        with self._lock:
            if key in self._said:
                return False
            self._said.add(key)
        log.warning(message, *args)
        return True
