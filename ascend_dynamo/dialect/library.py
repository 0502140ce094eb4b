"""Registration with torch.library: one Library holds every operator of the dialect for the life of the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ascend_dynamo._torch_compat import privateuse1_name, redispatch_below_autograd
from ascend_dynamo.dialect.spec import NAMESPACE, AutocastPolicy, OpSpec

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# dispatch key -> its device type, asked when called, since a backend may be renamed ("npu") after this import
_AUTOCAST_KEYS: dict[str, Callable[[], str]] = {
    "AutocastCPU": lambda: "cpu",
    "AutocastCUDA": lambda: "cuda",
    "AutocastPrivateUse1": privateuse1_name,
}


def define(spec: OpSpec) -> None:
    """Register schema, eager kernel, fake, autocast and gradient of one operator."""
    _LIBRARY.define(spec.name + spec.signature, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(spec.name, spec.kernel or spec.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(spec.qualname, spec.fake, lib=_LIBRARY)
    for key, device_type in _AUTOCAST_KEYS.items():
        _LIBRARY.impl(spec.name, _autocast_kernel(spec, device_type), key)
    _LIBRARY.impl(spec.name, _autograd_kernel(spec), "Autograd", with_keyset=True)


def define_host(name: str, signature: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator that is bookkeeping on the host: no reference, no gradient, no autocast, run as it is."""
    _LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def autocast_dtype(policy: AutocastPolicy, device: str) -> torch.dtype | None:
    """The dtype to which a policy casts arguments in an autocast region of a device type; None leaves them."""
    if policy == "lower":
        return torch.get_autocast_dtype(device)
    return torch.float32 if policy == "cuda_fp32" and device == "cuda" else None


def _autocast_kernel(spec: OpSpec, device_type: Callable[[], str]) -> Callable[..., Any]:
    """Cast by the op's policy, then run with autocast off: what the reference computes must not depend on a region.

    torch.library.register_autocast cannot do this: it takes no keyword arguments, and one dtype fixed in advance.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        device = device_type()
        dtype = autocast_dtype(spec.autocast, device)

        def cast(leaf: Any) -> Any:
            eligible = isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
            return leaf.to(dtype) if eligible and leaf.device.type == device else leaf

        if dtype is not None:
            args, kwargs = pytree.tree_map(cast, (args, kwargs))
        with torch.autocast(device, enabled=False):
            return spec.overload(*args, **kwargs)

    return kernel


def _autograd_kernel(spec: OpSpec) -> Callable[..., Any]:
    """Where a gradient is asked for, the op is its reference, which autograd differentiates; else it stays whole.

    torch.library.register_autograd ignores keyword-only tensors (bias, sinks), which would lose their gradients.
    """

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in (*args, *kwargs.values())
        ):
            if not spec.differentiable:
                raise NotImplementedError(
                    f"{spec.qualname} has no gradient; call it under torch.no_grad() or torch.inference_mode()"
                )
            return spec.reference(*args, **kwargs)
        return redispatch_below_autograd(spec.overload, keyset, args, kwargs)

    return kernel
