"""Attention, recognised by structure.

``walk.py`` goes up from a softmax, one step at a time, and records what each step means for ``ascend.flash_attention``
(``read.py`` reads the single calls).
``operands.py`` finds q, k and v behind layout and grouped heads. ``eager.py`` is the pattern over both; ``sdpa.py`` the
one for ``aten.scaled_dot_product_attention``, which capture keeps whole. A new spelling is a new step in
``walk.STEPS``; nothing else changes.
"""
