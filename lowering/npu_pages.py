"""Page sizes of the NPU's attention operators: aclnnFusedInferAttentionScoreV4, decode branch (Nov 2025)."""

from __future__ import annotations

import torch

from ascend_dynamo.runtime.kv.page_sizes import PageSizes

_BY_WIDTH = {2: PageSizes(16, 512, 128), 1: PageSizes(32, 512, 128)}  # bytes per element: fp16 and bf16, int8
NPU_DTYPES = (torch.float16, torch.bfloat16, torch.int8)


def npu_page_sizes(dtype: torch.dtype) -> PageSizes:
    """Legal page sizes for caches of ``dtype``; those of bf16 for dtypes that the operators do not read (the reference
    path casts)."""
    return _BY_WIDTH[dtype.itemsize if dtype in NPU_DTYPES else 2]
