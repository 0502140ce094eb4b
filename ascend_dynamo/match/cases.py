"""Drawing cases over a pattern's declared domain: sizes, ranks, dtypes, layouts, aliases, scalars, choices."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ascend_dynamo.match.samples import VARIADIC, Sample, Signature, deciding

_WIDE = 1 << 12  # scalars are drawn by magnitude over ranges wider than this


@dataclass(frozen=True)
class Case:
    """One call of one spelling: ``fn(*args)`` over distinct tensors; ``must_fire`` if the pattern claims it."""

    text: str
    spelling: int
    dtype: torch.dtype
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    dynamic: bool
    must_fire: bool

    def tensors(self) -> list[torch.Tensor]:
        return [a for a in self.args if isinstance(a, torch.Tensor)]


def draw_case(pattern: Any, index: int, rng: random.Random, dtype: torch.dtype) -> Case:
    """The ``index``-th case: spellings take turns; the first of each is plain, later ones grow stranger."""
    spelling = index % len(pattern.eager)
    turn = index // len(pattern.eager)
    torch_seed = rng.randrange(1 << 31)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)
        if getattr(pattern, "signature", None) is None:
            return _procedural(pattern, spelling, rng, dtype, turn)
        return _declarative(pattern, spelling, rng, dtype, turn)


def _procedural(pattern: Any, spelling: int, rng: random.Random, dtype: torch.dtype, turn: int) -> Case:
    args = tuple(pattern.fuzz_inputs(rng, dtype, spelling))
    fn = pattern.eager[spelling]
    must = all(s > 1 for a in args if isinstance(a, torch.Tensor) for s in a.shape)
    dynamic = turn % 4 == 3 and must
    shapes = ", ".join(str(list(a.shape)) if isinstance(a, torch.Tensor) else repr(a) for a in args)
    text = f"{_name(fn)}({shapes}) {dtype}" + (" dynamic" if dynamic else "")
    return Case(text, spelling, dtype, fn, args, dynamic, must and not dynamic)


def _declarative(pattern: Any, spelling: int, rng: random.Random, dtype: torch.dtype, turn: int) -> Case:
    signature: Signature = pattern.signature
    mode = ("plain", "square", "dynamic", "layout", "ones", "alias", "empty", "plain")[turn % 8]
    sample = _sample(signature, rng, dtype, mode)
    kinds = {"noncontiguous": mode == "layout"}
    args: list[Any] = []
    for name in signature.order:
        if name in signature.shapes:
            count = sample.count if name == signature.variadic else 1
            shape = sample.shape(signature.shapes[name])
            kind = signature.dtypes.get(name, dtype)
            args.extend(_tensor(shape, kind, rng, kinds["noncontiguous"]) for _ in range(count))
        else:
            args.append(sample.scalars[name] if name in sample.scalars else sample.choices[name])
    planned = [rng.random() < 0.5 for _ in range(8)]
    fn = _deciding(pattern.eager[spelling], planned)
    text = f"{_name(pattern.eager[spelling])} {mode} {_sizes(sample)} {dtype}"
    must = mode in ("plain", "square", "dynamic", "layout") and all(
        s > 1 for a in args if isinstance(a, torch.Tensor) for s in a.shape
    )
    if mode == "alias":
        fn, args, text = _aliased(fn, args, text)
    return Case(text, spelling, dtype, fn, tuple(args), mode == "dynamic" and must, must)


def _deciding(fn: Callable[..., Any], planned: list[bool]) -> Callable[..., Any]:
    def decided(*args: Any) -> Any:
        with deciding(planned):
            return fn(*args)

    return decided


def _sample(signature: Signature, rng: random.Random, dtype: torch.dtype, mode: str) -> Sample:
    same = rng.choice([2, 4, 6])
    primes = rng.sample([2, 3, 5, 7, 11], 5)
    sizes: dict[str, Any] = {}
    for name in signature.spreads():
        rank = rng.choice([0, 1, 2, 3]) if mode != "dynamic" else rng.choice([1, 2])
        sizes["*" + name] = tuple(_size(rng, 1, None, mode, same, primes) for _ in range(rank))
    for name in signature.sizes():
        low, high = signature.dims.get(name, (1, None))
        sizes[name] = _size(rng, low, high, mode, same, primes)
    if mode == "empty":
        loose = [n for n in sizes if not n.startswith("*") and signature.dims.get(n, (0, None))[0] == 0]
        spreads = [n for n in sizes if n.startswith("*") and sizes[n]]
        if spreads and (not loose or rng.random() < 0.5):
            name = rng.choice(spreads)
            sizes[name] = (0, *sizes[name][1:])
        elif loose:
            sizes[rng.choice(loose)] = 0
    scalars = {n: draw_scalar(rng, low, high) for n, (low, high) in signature.scalars.items()}
    choices = {n: rng.choice(values) for n, values in signature.choices.items()}
    count = rng.choice(VARIADIC) if signature.variadic else 1
    return Sample(dtype, sizes, scalars, choices, count)


def _size(rng: random.Random, low: int, high: int | None, mode: str, same: int, primes: list[int]) -> int:
    size = same if mode == "square" else rng.choice([1, 1, 2, 3]) if mode == "ones" else primes[rng.randrange(5)]
    if mode == "dynamic":
        size = max(size, 2)
    return max(low, size if high is None else min(size, high))


def draw_scalar(rng: random.Random, low: float, high: float) -> float:
    """A number of the declared range, of the kind of its bounds."""
    if isinstance(low, int) and isinstance(high, int):
        return rng.randint(low, high)
    if low > 0 and high / low > _WIDE:
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return rng.uniform(low, high)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, rng: random.Random, strange: bool) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.7
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(0, 4, shape, dtype=dtype)
    if not strange or not shape:
        return torch.randn(shape, dtype=dtype)
    kind = rng.randrange(3)
    if kind == 0:  # another order in memory
        order = list(range(len(shape)))
        rng.shuffle(order)
        base = torch.randn([shape[i] for i in order], dtype=dtype)
        return base.permute([order.index(i) for i in range(len(shape))])
    if kind == 1:  # every other element of something wider
        return torch.randn((*shape[:-1], 2 * shape[-1]), dtype=dtype)[..., ::2]
    return torch.randn((*shape[:-1], shape[-1] + 3), dtype=dtype)[..., 3:]  # an offset


def _aliased(fn: Callable[..., Any], args: list[Any], text: str) -> tuple[Callable[..., Any], list[Any], str]:
    """Two arguments of equal dtype and shape become one tensor, if there are such."""
    tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    for i in tensors:
        for j in tensors:
            if i < j and args[i].shape == args[j].shape and args[i].dtype == args[j].dtype:

                def same(*given: Any, i: int = i, j: int = j) -> Any:
                    return fn(*given[:j], given[i], *given[j:])

                return same, [*args[:j], *args[j + 1 :]], f"{text} arguments {i} and {j} are one tensor"
    return fn, args, text


def _sizes(sample: Sample) -> str:
    parts = {**sample.sizes, **sample.scalars, **sample.choices}
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in parts.items())


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
