"""What an operator of the dialect is: schema, its meaning twice over, fake, rounding budget, samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from ascend_dynamo.dialect.equal import Disagreement, agree

NAMESPACE = "ascend"
# keep: the op runs as it is, whatever autocast is active. lower: like aten's matmul and attention, floating arguments
# other than float64 become the autocast dtype. cuda_fp32: as keep, but float32 on CUDA (aten.rms_norm's policy there).
AutocastPolicy = Literal["keep", "lower", "cuda_fp32"]


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, and in a few words what is special about them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


class Draw:
    """Seeded random tensors for samples: the same seed and dtype draw the same values."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale
        return values.to(dtype or self.dtype)

    def uniform(self, *shape: int, low: float, high: float, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.rand(shape, generator=self._generator, dtype=torch.float64) * (high - low) + low
        return values.to(dtype or self.dtype)

    def ints(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator).to(dtype)

    def bools(self, *shape: int, true: float = 0.7) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator) < true

    def permutation(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self._generator)


def lift(tree: Any) -> Any:
    """``tree`` with floating tensors and floating dtype arguments made float64: the algebra without rounding."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.double()
        return torch.float64 if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf

    return pytree.tree_map(one, tree)


@dataclass(frozen=True)
class OpSpec:
    """One operator ``torch.ops.ascend.<name>``.

    ``reference`` is its meaning in ATen calls: traceable, no data-dependent shapes; used to decompose the op.
    ``kernel`` runs on real tensors in eager mode (the reference, unless real values allow something cheaper).
    ``fake`` gives dtype, shape and strides of the result by one allocation per output. ``formula`` computes the same
    mathematics in float64 by another path, without rounding. Results agree with it within ``c_ulp`` units of the
    output dtype's eps, relative to ``row_scale`` (default: the largest magnitude of each row of the exact result).
    Every output is contiguous, unless the op's doc says otherwise, so its strides follow from its shape.
    ``differentiable`` is False where a gradient has no meaning; asking for one is then an error.
    """

    name: str
    signature: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    formula: Callable[..., Any]
    c_ulp: float
    samples: Callable[[Draw], Iterable[Sample]]
    kernel: Callable[..., Any] | None = None
    row_scale: Callable[..., Any] | None = None
    autocast: AutocastPolicy = "keep"
    differentiable: bool = True

    @property
    def qualname(self) -> str:
        return f"{NAMESPACE}::{self.name}"

    @property
    def packet(self) -> Any:
        """``torch.ops.ascend.<name>``."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name)

    @property
    def overload(self) -> Any:
        """``torch.ops.ascend.<name>.default``, what graphs call."""
        return self.packet.default

    @property
    def doc(self) -> str:
        """Shapes, dtypes and semantics: the docstring of the reference."""
        return self.reference.__doc__ or ""

    @property
    def mutates(self) -> bool:
        return "!" in self.signature

    def lift_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments without rounding: float64 tensors and dtypes, and ``compute`` where it was defaulted."""
        args, kwargs = lift((tuple(args), dict(kwargs)))
        defaults = {"compute": torch.float64} if " compute=" in self.signature else {}
        return args, {**defaults, **kwargs}

    def f64(self, *args: Any, **kwargs: Any) -> Any:
        """The formula on float64 copies of the arguments."""
        args, kwargs = self.lift_call(args, kwargs)
        return self.formula(*args, **kwargs)

    def scale64(self, *args: Any, **kwargs: Any) -> Any:
        """The row scales of the rounding budget for these arguments, or None for the default."""
        if self.row_scale is None:
            return None
        args, kwargs = self.lift_call(args, kwargs)
        return self.row_scale(*args, **kwargs)

    def judge(self, new: Any, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Disagreement | None:
        """Whether ``new``, a kernel's result for these arguments, is what the operator means; the reason if not.

        ``dtype`` is the dtype in which the inputs are rounded (default: the first floating argument's).
        """
        if dtype is None:
            leaves = pytree.tree_leaves((args, kwargs))
            dtype = next((t.dtype for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()), None)
        eager = self.reference(*args, **kwargs)
        exact, scale = self.f64(*args, **kwargs), self.scale64(*args, **kwargs)
        return agree(new, eager, exact, dtype=dtype, c_ulp=self.c_ulp, row_scale=scale)
