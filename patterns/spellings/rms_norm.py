"""RMSNorm as model code spells it. The parameters are always (x, w, eps)."""

from __future__ import annotations

import torch


def llama(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * h.to(x.dtype)


def t5(x, w, eps):  # type: ignore[no-untyped-def]
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + eps)).to(w.dtype)


def weight_inside(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.float()
    return (w * (h * torch.rsqrt((h * h).mean(-1, True) + eps))).to(x.dtype)


def gemma(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + w.float())).type_as(x)


def native(x, w, eps):  # type: ignore[no-untyped-def]
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w


def power(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.float()
    return (h * torch.pow(eps + h.pow(2).mean(-1, keepdim=True), -0.5)).to(x.dtype) * w


def no_weight(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).type_as(x)


def stays_float(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.float()
    return w.float() * (torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * h)


def two_axes(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean((-2, -1), keepdim=True) + eps)).type_as(x)


EXACT = (llama, t5, weight_inside, gemma, native, power, no_weight, stays_float, two_axes)


def division(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.to(torch.float32)
    return w * (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def reciprocal(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.to(torch.float32)
    return w * (h * (1.0 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def by_sum(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps) * (1.0 + w.float())).type_as(x)


def by_scaled_sum(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.float()
    return (w * (h / ((h * h).sum(-1, keepdim=True) * (1 / x.shape[-1]) + eps).sqrt())).to(x.dtype)


REORDERED = (division, reciprocal, by_sum, by_scaled_sum)
