"""What checking a pattern brought to light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something about a pattern or a registry: which check found it, a sentence, and for the fuzzer the case.

    ``severity`` "error" means that the pattern is wrong or dead; "note" that its author may want to know.
    """

    pattern: str
    check: str
    sentence: str
    case: str = ""
    severity: Literal["error", "note"] = "error"

    def __str__(self) -> str:
        case = f" [{self.case}]" if self.case else ""
        return f"{self.pattern}: {self.check}: {self.sentence}{case}"
