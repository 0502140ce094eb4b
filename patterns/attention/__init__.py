"""Attention, recognised by structure.

``softmax.py`` reads a softmax in any spelling. ``walk.py`` goes up from it, one step at a time, to q k^T and records
what each step means for ``ascend.flash_attention``; ``weights.py`` goes down to the product with v. ``frame.py`` keeps
track of axes through every reshape and permute, ``groups.py`` says which are batch, heads, queries and keys,
``operands.py`` finds q, k and v behind grouped heads and scales, ``terms.py`` orders biases and masks. ``eager.py`` is
the pattern over all of them, ``sdpa.py`` the one for ``aten.scaled_dot_product_attention``, which capture keeps whole,
``near.py`` says why a softmax is no attention.

Masks: ``visible.py`` turns what is proven of them into ``causal`` and ``window`` (``flags.py``: for a walk's terms).
``mask_proof.py`` proves one mask; it evaluates an element of it as a function of its indices (``index_values.py`` with
``index_rules.py``, one rule per call) to a proposition about i and j (``formula.py``). A new call in masks is a new
rule; where no rule knows a call, its result is unknown and the mask stays an operand. What is known about masks that
compare keys with a length held in a tensor is in ``Visible.lengths``.

A new spelling is a new step in ``walk.STEPS``; nothing else changes.
"""
