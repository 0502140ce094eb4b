"""The dialect: semantic LLM operators ``torch.ops.ascend.*``. Importing this package registers all of them.

``SPECS`` maps each name to its ``OpSpec``; ``reference_of(op)`` is what an operator means in ATen calls.
``ascend_dynamo.dialect.equal`` defines when two results are equal.
"""

from __future__ import annotations

from ascend_dynamo.dialect.registry import SPECS, is_dialect_op, reference_of, spec_of
from ascend_dynamo.dialect.spec import NAMESPACE, Draw, OpSpec, Sample, lift

__all__ = ["NAMESPACE", "SPECS", "Draw", "OpSpec", "Sample", "is_dialect_op", "lift", "reference_of", "spec_of"]
