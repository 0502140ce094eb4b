"""``options={"dump": dir}``: every compiled graph leaves a folder with its texts and its report."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from ascend_dynamo.report.diff import unified
from ascend_dynamo.report.explain import Explanation
from ascend_dynamo.report.records import CompileRecord

log = logging.getLogger("ascend_dynamo.report")


def dump_record(record: CompileRecord, directory: str | Path) -> Path:
    """Write ``before.txt``, ``after.txt``, ``diff.txt``, ``record.json`` and ``report.html`` into a new folder.

    The folder is ``<directory>/graph_0000`` or the next free number: several processes may share a directory.
    Returns the folder. Raises OSError if it cannot be written.
    """
    folder = _new_folder(Path(directory))
    files = {
        "before.txt": record.before,
        "after.txt": record.after,
        "diff.txt": unified(record.before, record.after),
        "record.json": json.dumps(asdict(record), indent=2),
    }
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    Explanation(f"graph {record.index}", [record], seconds=sum(record.seconds.values())).html(folder / "report.html")
    log.info("wrote %s", folder)
    return folder


def _new_folder(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    number = sum(1 for _ in directory.glob("graph_*"))
    while True:
        folder = directory / f"graph_{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
