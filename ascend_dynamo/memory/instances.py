"""Planning problems as CSV files: ``id,lower,upper,size``, one buffer a line (times; the end is exclusive; bytes).

The form of the public instances of MiniMalloc; the capacity is the last number in the file's name, as in
``A.1048576.csv``. Columns ``alignment`` and ``offset`` (reserved; empty: free) may follow.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ascend_dynamo.errors import MemoryPlanError
from ascend_dynamo.memory.buffers import Buffer

_COLUMNS = ("id", "lower", "upper", "size")
_MORE = ("alignment", "offset")


def read_csv(path: Path | str) -> list[Buffer]:
    """The buffers of a file.

    Raises:
        MemoryPlanError: a column is missing, or a value is no integer; the message names file and line.
    """
    path = Path(path)
    with path.open(newline="") as f:
        rows = csv.DictReader(f, skipinitialspace=True)
        missing = [c for c in _COLUMNS if c not in (rows.fieldnames or ())]
        if missing:
            raise MemoryPlanError(f"{path}: no column {', '.join(missing)}: the first line must be id,lower,upper,size")
        return [_buffer(path, rows.line_num, row) for row in rows]


def _buffer(path: Path, line: int, row: dict[str, str | None]) -> Buffer:
    values: list[int | None] = []
    for name in (*_COLUMNS[1:], *_MORE):
        text = (row.get(name) or "").strip()
        if not text and name in _MORE:
            values.append(None)
            continue
        try:
            values.append(int(text))
        except ValueError:
            raise MemoryPlanError(f"{path}, line {line}: {name} is {text!r}, which is no integer") from None
    start, end, size, alignment, offset = values
    assert start is not None and end is not None and size is not None
    return Buffer((row["id"] or "").strip(), start, end, size, alignment or 1, offset)


def write_csv(path: Path | str, buffers: Sequence[Buffer]) -> None:
    """Write buffers in the form that ``read_csv`` reads; the further columns only where a buffer needs them."""
    more = any(b.alignment != 1 or b.offset is not None for b in buffers)
    with Path(path).open("w", newline="") as f:
        rows = csv.writer(f, lineterminator="\n")
        rows.writerow([*_COLUMNS, *(_MORE if more else ())])
        for b in buffers:
            rest = [b.alignment, "" if b.offset is None else b.offset] if more else []
            rows.writerow([b.id, b.start, b.end, b.size, *rest])


def capacity_of(path: Path | str) -> int | None:
    """The capacity that a file's name tells (``A.1048576.csv``), or None."""
    parts = Path(path).name.split(".")
    return int(parts[-2]) if len(parts) >= 3 and parts[-2].isdigit() else None
