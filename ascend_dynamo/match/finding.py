"""What checking a pattern brought to light."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A fault of a pattern or of a registry: which check found it, a sentence, and for the fuzzer the case."""

    pattern: str
    check: str
    sentence: str
    case: str = ""

    def __str__(self) -> str:
        case = f" [{self.case}]" if self.case else ""
        return f"{self.pattern}: {self.check}: {self.sentence}{case}"
