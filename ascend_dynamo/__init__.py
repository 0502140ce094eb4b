"""Ascend Dynamo: a graph compiler for LLM inference on Ascend NPUs, built on ``torch.compile``."""
