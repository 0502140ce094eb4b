"""Random histories of a cache: what it gives back and keeps is what was put in, and a refusal changes nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from kv_models import WINDOW, model_of

from ascend_dynamo.errors import KVCacheError
from ascend_dynamo.runtime.kv import PagedKVCache


class History:
    """A PagedKVCache of two layers (a sliding and a full one) beside the dense keys and values that it should hold."""

    def __init__(self, rng: random.Random, retain: bool) -> None:
        config = model_of("tiny-gemma2").config
        self.rng, self.retain = rng, retain
        self.cache = PagedKVCache(
            config,
            num_pages=rng.choice([6, 12, 40]),
            page_size=rng.choice([1, 3, 4, 8]),
            sliding_pages=rng.choice([None, 10, 40]),
            max_length=200,
            dtype=torch.float32,
        )
        if retain:
            self.cache.activate_past_recording()
        self.shape = config.num_key_value_heads, config.head_dim
        self.restart()

    def restart(self) -> None:
        heads, width = self.shape
        batch = self.rng.randint(1, 3)
        self.held = [[torch.zeros(batch, heads, 0, width)] * 2 for _ in range(2)]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.held[0][0].shape[0], self.held[0][0].shape[2]

    def expect(self, index: int, got: Any, since: int) -> None:
        """Keys and values are equal, except for what a window that forgets cannot see any more."""
        group = self.cache.layers[index].group
        first = 0 if group.pool.window is None or self.retain else max(since - WINDOW + 1, 0)
        for ours, held in zip(got, self.held[index], strict=True):
            assert ours.shape == held.shape and torch.equal(ours[:, :, first:], held[:, :, first:])

    def step(self) -> None:
        batch, length = self.sizes
        heads, width = self.shape
        count = self.rng.randint(1, 9)
        new = [[torch.randn(batch, heads, count, width) for _ in range(2)] for _ in range(2)]
        outputs = [self.cache.update(*new[i], i) for i in range(2)]
        self.held = [[torch.cat(pair, 2) for pair in zip(self.held[i], new[i], strict=True)] for i in range(2)]
        for i in range(2):
            self.expect(i, outputs[i], length)

    def crop(self) -> None:
        length = self.sizes[1]
        count = self.rng.randint(0, min(length, 7))
        self.cache.crop(-count)
        self.held = [[t[:, :, : length - count] for t in pair] for pair in self.held]
        if count == length:
            self.restart()

    def rows(self) -> None:
        batch, length = self.sizes
        how = self.rng.choice(["reorder", "repeat", "select", "mask"])
        if how == "repeat":
            index = torch.arange(batch).repeat_interleave(2)
            self.cache.batch_repeat_interleave(2)
        else:
            index = torch.tensor([self.rng.randrange(batch) for _ in range(batch if how == "reorder" else 2)])
            if how == "mask":
                index = torch.arange(batch) == index[0]
            (self.cache.reorder_cache if how == "reorder" else self.cache.batch_select_indices)(index)
        if length:
            self.held = [[t[index] for t in pair] for pair in self.held]

    def reset(self) -> None:
        if self.rng.random() < 0.2:
            self.cache.reset()
            self.restart()

    def check(self) -> None:
        statistics = self.cache.statistics()
        assert statistics.orphans == 0 and statistics.largest_waste < self.cache.page_size
        for group in self.cache.groups:
            group.pool.check()
        if self.sizes[1]:
            assert self.cache.get_seq_length() == self.sizes[1]
            for i in range(2):
                self.expect(i, self.cache.dense(i), self.sizes[1])


@pytest.mark.parametrize("retain", [True, False])
def test_any_history(retain: bool) -> None:
    rng = random.Random(3)
    done = refused = 0
    for _ in range(30):
        history = History(rng, retain)
        for _ in range(15):
            before = history.held
            try:
                rng.choice([history.step, history.step, history.step, history.crop, history.rows, history.reset])()
                done += 1
            except KVCacheError:
                assert history.held is before
                refused += 1
            history.check()
    assert done > 200 and refused > 10
