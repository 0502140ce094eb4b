"""Random small tensor programs, for comparing a graph before and after normalisation bit by bit.

Values are small whole numbers, so that sums and products are exact whatever the order of summation; -0.0 is among them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Step = Callable[[list[torch.Tensor]], list[torch.Tensor]]
LAST = 4  # size of the last axis of every input; the leading axes may be dynamic


def values(shape: Sequence[int], rng: random.Random, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    n = 1
    for s in shape:
        n *= s
    drawn = [rng.choice([-0.0, 0.0, 1.0, -1.0, 2.0, 3.0, -2.0]) for _ in range(n)]
    return torch.tensor(drawn, dtype=torch.float32).reshape(tuple(shape)).to(dtype)


def _unary(rng: random.Random, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A step on one tensor whose parameters depend only on rank, dtype and the (static) last size of ``x``."""
    rank, last = x.dim(), x.shape[-1] if x.dim() else 0
    d = rng.randrange(rank) if rank else 0
    e = rng.randrange(rank) if rank else 0
    dims = rng.sample(range(rank), rank)
    k = rng.randrange(last) if last else 0
    floating = x.is_floating_point()
    table: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
        "transpose": lambda t: t.transpose(d, e - rank),
        "permute": lambda t: t.permute(dims),
        "unsqueeze": lambda t: t.unsqueeze(d),
        "unsqueeze_squeeze": lambda t: t.unsqueeze(d).squeeze(d),
        "flatten": (lambda t: t.flatten(0, 1)) if rank >= 2 else None,
        "view_rows": (lambda t: t.contiguous().view(-1, t.shape[-1]) if t.numel() else t)
        if rank >= 2 and last
        else None,
        "reshape_same": lambda t: t.reshape(t.shape),
        "slice_last": lambda t: t[..., :2],
        "slice_tail": lambda t: t[..., -2:],
        "slice_all": lambda t: t[:],
        "slice_step": lambda t: t[..., ::2],
        "slice_rows": lambda t: t[1:],
        "select_last": (lambda t: t[..., k]) if last and rank > 1 else None,
        "select_neg": (lambda t: t[..., -1]) if last and rank > 1 else None,
        "chunk": (lambda t: t.chunk(2, -1)[-1]) if last >= 2 else None,
        "split": (lambda t: t.split([1, last - 1], -1)[1]) if last >= 1 else None,
        "unbind": (lambda t: t.unbind(-1)[k]) if last and rank > 1 else None,
        "rotate": (lambda t: torch.cat((-t[..., last // 2 :], t[..., : last // 2]), -1)) if last >= 2 else None,
        "cat_halves": (lambda t: torch.cat((t[..., : last // 2], t[..., last // 2 :]), -1)) if last >= 2 else None,
        "cat_one": lambda t: torch.cat([t], d),
        "cat_empty": lambda t: torch.cat([t, t[..., :0]], -1),
        "cat_self": (lambda t: torch.cat([t, t], d)[..., :LAST]) if rank else None,
        "stack": lambda t: torch.stack([t, t], -1),
        "expand": lambda t: t[None].expand(2, *t.shape),
        "expand_same": lambda t: t.expand(t.shape),
        "repeat": lambda t: t.repeat(*[1] * (rank - 1), 2)[..., :LAST],
        "repeat_ones": lambda t: t.repeat(*[1] * rank),
        "repeat_kv": (lambda t: t[:, None].expand(t.shape[0], 2, *t.shape[1:]).reshape(t.shape[0] * 2, *t.shape[1:]))
        if rank >= 2
        else None,
        "clone": lambda t: t.clone(),
        "contiguous": lambda t: t.contiguous(),
        "to_same": lambda t: t.to(t.dtype),
        "up_down": lambda t: t.to(torch.float64).to(t.dtype),
        "to_bf16": lambda t: t.to(torch.bfloat16),
        "to_float": lambda t: t.float(),
        "to_int": lambda t: t.to(torch.int32),
        "add_0": lambda t: t + 0,
        "add_0.": lambda t: t + 0.0,
        "sub_0": lambda t: t - 0,
        "mul_1": lambda t: t * 1,
        "mul_1.": lambda t: 1.0 * t,
        "div_1": lambda t: t / 1,
        "rsub": lambda t: 1 - t,
        "pow_1": lambda t: t.pow(1),
        "pow_2": lambda t: t.clamp(-4, 4).pow(2),
        "sqrt": lambda t: t.abs().float().pow(0.5).ceil(),
        "ceil": lambda t: t.ceil(),
        "round": lambda t: t.round(),
        "neg": lambda t: -t,
        "clamp": lambda t: t.clamp(-3, 3),
        "pad_0": lambda t: F.pad(t, (0, 0)),
        "pad": lambda t: F.pad(t, (1, 0))[..., :LAST],
        "sum": lambda t: t.clamp(-4, 4).sum(d, keepdim=True) if rank else t,
        "amax": (lambda t: t.amax(-1)) if last and rank > 1 else None,
        "narrow": (lambda t: t.narrow(-1, 1, last - 1)) if last >= 1 else None,
        "movedim": lambda t: t.movedim(d, e),
        "scatter_all": lambda t: torch.slice_scatter(t, t + 1, 0),
        "scatter": (lambda t: torch.slice_scatter(t, t[..., :1] * 2, -1, 0, 1)) if last else None,
        "scatter_row": (lambda t: torch.select_scatter(t, t[..., k] * 2, -1, k)) if last and rank > 1 else None,
        "filled": (lambda t: _filled(t, k)) if last else None,
        "filled_over": (lambda t: _filled(t, k, again=True)) if last else None,
        "filled_rows": (lambda t: _filled(t.transpose(0, -1), 1).transpose(0, -1)) if rank >= 2 and last else None,
        "written": (lambda t: _written(t, k)) if last else None,
        "alpha": (lambda t: torch.add(t.clamp(-9, 9), t.clamp(-9, 9), alpha=2)) if floating else None,
        "gram": (lambda t: t.float().clamp(-2, 2) @ t.float().clamp(-2, 2).transpose(-1, -2)) if rank >= 2 else None,
        "linear": (lambda t: F.linear(t.float().clamp(-2, 2), torch.ones(3, last))) if last and rank > 1 else None,
        "detach": lambda t: t.detach(),
        "ones": lambda t: t + torch.ones(()),
    }
    steps = [fn for fn in table.values() if fn is not None]
    return rng.choice(steps) if rank else rng.choice([lambda t: t + 0, lambda t: t * 1, lambda t: t.clone()])


def _filled(x: torch.Tensor, k: int, *, again: bool = False) -> torch.Tensor:
    """A new tensor, written piece by piece along its last axis, the last piece first; ``again``: some of it twice."""
    y = x.new_empty(x.shape)
    if again:
        y[..., :k] = 3
        y[..., k:] = x[..., :1]
    y[..., k:] = x[..., k:] * 2
    y[..., :k] = x.double()[..., :k]
    return y


def _written(x: torch.Tensor, k: int) -> torch.Tensor:
    """A copy of which a part is written and then read, beside a part that is not."""
    y = x.clone()
    y[..., k : k + 2] = x[..., k : k + 2] + 1
    return torch.cat((y[..., k : k + 1], y[..., k + 2 :], y[..., :k], y[..., k + 1 : k + 2]), -1)


def program(
    seed: int, examples: Sequence[torch.Tensor], *, length: int = 8, mutate: bool = False
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A deterministic function of tensors shaped like ``examples``; ``mutate`` lets it write to inputs and values."""
    rng = random.Random(seed)
    steps: list[Step] = []
    live = [e.clone() for e in examples]
    count = len(live)
    while len(steps) < length:
        i = rng.randrange(len(live))
        step: Step | None = None
        if mutate and rng.random() < 0.25:
            step = _write(rng, i)
        elif rng.random() < 0.15:
            step = _repeat_value(rng, i)
        else:
            fn = _unary(rng, live[i])
            step = None if fn is None else _append(fn, i)
        if step is None:
            continue
        trial = step([t.clone() for t in live])
        if trial[-1].numel() > 4096 or trial[-1].dim() > 5 or trial[-1].abs().double().nan_to_num(0).gt(1e6).any():
            continue
        steps.append(step)
        live = trial
    picked = sorted(rng.sample(range(len(live)), min(3, len(live))))
    if rng.random() < 0.3:
        picked.append(picked[0])
    if rng.random() < 0.3:
        picked.insert(0, len(live) - 1)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = list(inputs)
        assert len(values) == count
        for step in steps:
            values = step(values)
        return tuple(values[i] for i in picked)

    return run


def _append(fn: Callable[[torch.Tensor], torch.Tensor], i: int) -> Step:
    return lambda values: [*values, fn(values[i])]


def _repeat_value(rng: random.Random, i: int) -> Step:
    """The same value computed again: CSE must not make two outputs one."""
    number = rng.choice([1, 1.0, True, 2])
    return lambda values: [*values, values[i] + number]


def _write(rng: random.Random, i: int) -> Step:
    number = rng.choice([1, 2])
    kind = rng.randrange(3)

    def step(values: list[torch.Tensor]) -> list[torch.Tensor]:
        target = values[i]
        if kind == 0:
            target.add_(number)
        elif kind == 1:
            target[..., :1].mul_(number)
        else:
            target.copy_(values[-1].sum().to(target.dtype).clamp(-9, 9))
        return [*values, target * 1]

    return step
