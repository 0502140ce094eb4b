"""``options={"dump": directory}``: one folder of plain files per compiled graph."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from ascend_dynamo.report.records import CompileRecord


def dump_record(record: CompileRecord, directory: str) -> Path:
    """Write ``before.txt``, ``after.txt`` and ``record.json`` into a new folder below ``directory``; returns it.

    Folders are named by process and graph, so that several processes may share the directory.
    """
    folder = Path(directory) / f"{os.getpid()}-graph{record.index}"
    number = 0
    while folder.exists():
        number += 1
        folder = Path(directory) / f"{os.getpid()}-graph{record.index}.{number}"
    folder.mkdir(parents=True)
    (folder / "before.txt").write_text(record.before + "\n")
    (folder / "after.txt").write_text(record.after + "\n")
    body = {k: v for k, v in asdict(record).items() if k not in ("before", "after")}
    (folder / "record.json").write_text(json.dumps(body, indent=2) + "\n")
    return folder
