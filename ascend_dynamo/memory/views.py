"""Which shapes a strided tensor can be viewed in without a copy."""

from __future__ import annotations


def is_dense(sizes: list[int], strides: list[int]) -> bool:
    """Whether the elements lie side by side in the order of the axes (torch calls that contiguous)."""
    blocks = blocks_of(sizes, strides)
    return 0 in sizes or not blocks or (len(blocks) == 1 and blocks[0][1] == 1)


def blocks_of(sizes: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """Maximal runs of axes that lie in memory as one axis: (elements, innermost stride) of each, outermost first."""
    blocks: list[tuple[int, int]] = []
    for n, s in zip(sizes, strides, strict=True):
        if n == 1:
            continue
        if blocks and blocks[-1][1] == n * s:
            blocks[-1] = (blocks[-1][0] * n, s)
        else:
            blocks.append((n, s))
    return blocks


def viewable(sizes: list[int], strides: list[int], shape: list[int]) -> bool:
    """Whether a tensor of these sizes and strides can be viewed in ``shape`` (ATen's rule: no axis of the result
    crosses the border of two blocks that do not lie one behind the other)."""
    if 0 in sizes:
        return True
    todo = [n for n in shape if n != 1]
    for elements, _ in blocks_of(sizes, strides):
        while elements > 1:
            if not todo or elements % todo[0]:
                return False
            elements //= todo.pop(0)
    return not todo
