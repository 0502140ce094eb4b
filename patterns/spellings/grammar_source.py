"""The sizes of one spelling of attention, and the lines of source that its productions write one after another."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from ascend_dynamo.match.grammar import Program

_QUERIES = {"self": 5, "decode": 1, "chunk": 3, "cross": 6, "square": 4, "one_key": 3, "long": 19}
_KEYS = {"self": 5, "decode": 6, "chunk": 7, "cross": 4, "square": 4, "one_key": 1, "long": 19}


class Writer:
    """Source under construction.

    ``order`` holds the axes of each variable: b batch, h head (g the query heads of one key head, where they are an
    axis of their own), s query, t key, d head size, e size of a value. Inputs and views tell H, the heads of queries,
    from K, those of keys. ``sizes_from`` says where b, s and t are read; ``begun`` is False as long
    as there are no scores to add to; ``total`` is what the output is divided by, if the weights were not.
    """

    def __init__(self, choices: Mapping[str, str], rng: random.Random) -> None:
        self.choices, self.rng = choices, rng
        c = choices
        self.B = 2 if c["batch"] == "several" else 1
        self.Sq, self.Sk = _QUERIES[c["lengths"]], _KEYS[c["lengths"]]
        self.D = 4 if c["lengths"] == "square" else 8
        self.Dv = self.D if c["value_size"] == "same" else 6
        self.Hk = 1 if c["heads"] == "one" else 2
        self.G = 1 if c["gqa"] == "none" else 3
        self.Hq = self.Hk * self.G
        self.dtype = f"torch.{c['dtype']}"
        self.inputs: dict[str, str] = {}
        self.dynamic: dict[str, tuple[int, ...]] = {}
        self.lines: list[str] = []
        self.order: dict[str, str] = {}
        self.sizes_from: dict[str, str] = {}
        self.returned: list[str] = []
        self.begun = True
        self.total = ""
        self.why_near = ""

    # ---- inputs

    def input(self, name: str, axes: str, kind: str = "randn") -> str:
        """An input with the given axes (letters, or digits for constant sizes); ``kind`` is the expression's function.

        ``kind`` may name SHAPE and DTYPE.
        """
        sizes = [self.size(a) for a in axes]
        shape = ", ".join(map(str, sizes))
        self.inputs[name] = {
            "randn": f"torch.randn({shape}, dtype={self.dtype})",
            "keep": f"torch.rand({shape}) < 0.7",
        }.get(kind, kind.replace("SHAPE", shape).replace("DTYPE", self.dtype))
        wanted = {"static": "", "batch": "b", "sequence": "st", "all": "bst"}[self.choices["dynamic"]]
        self.dynamic[name] = tuple(i for i, a in enumerate(axes) if a in wanted)
        return name

    def size(self, letter: str) -> int:
        if letter.isdigit():
            return int(letter)
        sizes = {"b": self.B, "H": self.Hq, "K": self.Hk, "g": self.G, "s": self.Sq, "t": self.Sk,
                 "d": self.D, "e": self.Dv}  # fmt: skip
        return sizes[letter]

    # ---- lines

    def add(self, *lines: str) -> None:
        self.lines.extend(lines)

    def set(self, name: str, expression: str, order: str | None = None) -> str:
        """``name = expression``; ``order`` are the axes of the result, by default those that ``name`` had."""
        self.add(f"{name} = {expression}")
        if order is not None:
            self.order[name] = order
        return name

    def scores_axes(self) -> str:
        """The axes of q k^T."""
        q = self.order["q"]
        return {"bsd": "bst", "hsd": "hst"}.get(q, "bhgst" if "g" in q else "bhst")

    def axis(self, name: str, letter: str) -> int:
        return self.order[name].index(letter)

    def in_order(self, name: str, order: str) -> str:
        """An expression for variable ``name`` with its axes in ``order``."""
        have = self.order[name]
        if have == order:
            return name
        moved = [have.index(a) for a in order]
        swapped = [i for i, m in enumerate(moved) if i != m]
        if len(swapped) == 2:
            return f"{name}.transpose({swapped[0]}, {swapped[1]})"
        return f"{name}.permute({', '.join(map(str, moved))})"

    def fitted(self, expression: str, axes: str) -> str:
        """A term with axes such as ``b1st`` (H for all heads) as one that broadcasts to the scores."""
        scores = self.order["scores"]
        if scores == "bsht":
            return f"{expression}[:, None, :]" if len(axes) == 2 else f"{expression}.transpose(1, 2)"
        if scores == "bhst" or len(axes) == 2:
            return expression
        if scores == "hst":
            return f"{expression}.squeeze(0)"
        if scores == "bst":
            return f"{expression}.squeeze(1)"
        if axes[1] == "1":
            return f"{expression}.unsqueeze(2)"
        return f"{expression}.unflatten(1, ({self.Hk}, {self.G}))"

    def program(self) -> Program:
        """The finished program; sizes by name are read off the inputs that have them."""
        text = "\n".join((*self.lines, *self.returned))
        head = []
        for letter in "bst":
            if re.search(rf"\b{letter}\b", text):
                head.append(f"{letter} = {self.sizes_from[letter]}")
        lines = (*head, *self.lines, f"return {', '.join(self.returned)}")
        return Program(dict(self.inputs), lines, dict(self.dynamic), self.why_near)
