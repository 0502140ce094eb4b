"""A plugin of Ascend Dynamo: the squared ReLU of Primer-style MLPs as one operator of its own."""

from ascend_dynamo_example_plugin.squared_relu import PATTERNS

__all__ = ["patterns"]


def patterns():
    """What the entry point ``ascend_dynamo.patterns`` calls: an iterable of patterns, or a Registry."""
    return PATTERNS
