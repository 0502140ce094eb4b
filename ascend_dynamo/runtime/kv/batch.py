"""Requests packed into one step: prompts, parts of prompts and single new tokens side by side, over one paged cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ascend_dynamo._torch_compat import mark_static_sizes
from ascend_dynamo.errors import KVCacheError, UnknownSequenceError
from ascend_dynamo.runtime.kv.cache import PagedKVCache
from ascend_dynamo.runtime.kv.layer import PagedLayer
from ascend_dynamo.runtime.kv.records import ABSENT
from ascend_dynamo.runtime.kv.store import block_table


@dataclass(frozen=True)
class PagedBatch:
    """One step of several requests, its T tokens one after the other.

    ``q_start`` [B+1] and ``kv_len`` [B] int32 in host memory: request b owns tokens q_start[b] to q_start[b+1] and has
    kv_len[b] keys once they are written. ``block_tables`` [B, columns] int32 and ``slot_mappings`` [T] int64, one per
    group of layers (``PagedKVCache.groups``). ``input_ids`` and ``position_ids`` [1, T]; ``last`` [B] int64 are the
    tokens whose logits say what comes next. Padding, if asked for, stands behind the requests and the tokens.
    """

    requests: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    q_start: Tensor
    kv_len: Tensor
    block_tables: tuple[Tensor, ...]
    slot_mappings: tuple[Tensor, ...]
    last: Tensor
    view: PackedView

    @property
    def block_table(self) -> Tensor:
        return self.block_tables[0]

    @property
    def slot_mapping(self) -> Tensor:
        return self.slot_mappings[0]

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments for a model that uses ``"ascend_paged"`` attention; logits [1, B, vocab] come back."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "past_key_values": self.view,
            "paged": self,
            "logits_to_keep": self.last,
        }


class PackedView(Cache):
    """What the model takes for a cache: ``update`` writes the packed tokens' keys and values to their pages and hands
    them back as they are; attention reads the pages."""

    layers: list[PagedLayer]  # type: ignore[assignment]  # of the same kind all

    def __init__(self, layers: Sequence[PagedLayer], groups: Sequence[int]) -> None:
        super().__init__(layers=[*layers])
        self.group_of = tuple(groups)
        self.slot_mappings: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        layer.fit(key_states, value_states)
        layer.write(key_states, value_states, self.slot_mappings[self.group_of[layer_idx]])
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given, and no mask is made from lengths

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class PagedRequests:
    """Requests over the pages of a ``PagedKVCache``: opened by their tokens, run by any mixture of steps.

    ::

        requests = PagedRequests(cache)
        first = requests.open(prompt)                      # a stored prefix is found and shared
        batch = requests.step({first: prompt[requests.length(first):], second: [token]})
        logits = model(**batch.inputs()).logits            # [1, 2, vocab]
        requests.commit(batch)                             # from now on others may share what was written

    What changes something does all of it, in every group of layers, or raises a KVCacheError and changes nothing.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self._sequences: dict[int, list[int]] = {}
        self._next = 0
        indices = {id(group): i for i, group in enumerate(cache.groups)}
        self._group_of = [indices[id(layer.group)] for layer in cache.layers]

    def open(self, tokens: Sequence[int], *, salt: bytes = b"") -> int:
        """A new request. As many of its first tokens as are stored already (whole pages, in every group) are shared:
        ``length`` says how many; feed the rest to ``step``."""
        pools = [group.pool for group in self.cache.groups]
        limit = min(pool.match(tokens, salt=salt) for pool in pools)
        return self._add([pool.open(tokens, salt=salt, limit=limit).sequence for pool in pools])

    def fork(self, request: int) -> int:
        """Another request that says the same so far; shares every page until one of them goes on."""
        sequences = self._get(request)
        return self._add([g.pool.fork(s) for g, s in zip(self.cache.groups, sequences, strict=True)])

    def length(self, request: int) -> int:
        """Tokens that are stored for a request."""
        return self.cache.groups[0].pool.length(self._get(request)[0])

    def free(self, *requests: int) -> None:
        """End requests; what was committed stays cached until its pages are needed."""
        held = [self._get(request) for request in requests]
        for group, sequences in zip(self.cache.groups, zip(*held, strict=True), strict=True):
            group.pool.free(*sequences)
        for request in requests:
            del self._sequences[request]

    def crop(self, request: int, length: int) -> None:
        """Keep only the first ``length`` tokens (speculative decoding)."""
        pairs = list(zip(self.cache.groups, self._get(request), strict=True))
        for group, sequence in pairs:
            group.pool.crop([sequence], length, dry_run=True)
        for group, sequence in pairs:
            group.copy_pages(group.pool.crop([sequence], length))

    def step(self, news: Mapping[int, Sequence[int]], *, rows: int = 0, tokens: int = 0) -> PagedBatch:
        """Room for the new tokens of each request (in this order), and what a model needs to run them.

        The batch is padded to at least ``rows`` requests and ``tokens`` tokens, so that compiled code sees few shapes;
        what it computes for the padding means nothing.
        """
        if not news or any(not len(new) for new in news.values()):
            raise KVCacheError("a step has at least one request, and at least one token of each")
        held = [self._get(request) for request in news]
        wanted = [dict(zip(sequences, news.values(), strict=True)) for sequences in zip(*held, strict=True)]
        groups = self.cache.groups
        for group, want in zip(groups, wanted, strict=True):
            group.pool.require(want)
        begins = [self.length(request) for request in news]
        ends = [begin + len(new) for begin, new in zip(begins, news.values(), strict=True)]
        if max(ends) > groups[0].width * groups[0].page_size:
            raise KVCacheError(
                f"a request of {max(ends)} tokens does not fit tables of {groups[0].width} pages of"
                f" {groups[0].page_size}; make the cache with max_length={max(ends)} or more"
            )
        starts = [0, *accumulate(map(len, news.values()))]
        padding, empty = [0] * (tokens - starts[-1]), [0] * (rows - len(news))
        device = groups[0].device
        input_ids = torch.tensor([[*(t for new in news.values() for t in new), *padding]], device=device)
        for group, want in zip(groups, wanted, strict=True):
            group.copy_pages(group.pool.append_all(want))
        spans = list(zip(begins, ends, strict=True))
        view = PackedView(self.cache.layers, self._group_of)
        for group, want in zip(groups, wanted, strict=True):
            slots = [slot for s, span in zip(want, spans, strict=True) for slot in group.pool.slots(s, *span)]
            view.slot_mappings += (torch.tensor([*slots, *[ABSENT] * len(padding)], device=device),)
        return PagedBatch(
            requests=tuple(news),
            input_ids=input_ids,
            position_ids=torch.tensor([[*(p for span in spans for p in range(*span)), *padding]], device=device),
            q_start=torch.tensor([*starts, *[starts[-1]] * len(empty)], dtype=torch.int32),
            kv_len=torch.tensor([*ends, *empty], dtype=torch.int32),
            block_tables=tuple(
                mark_static_sizes(
                    block_table([*(group.pool.table(s) for s in want), *[()] * len(empty)], group.width), 1
                ).to(device)
                for group, want in zip(groups, wanted, strict=True)
            ),
            slot_mappings=view.slot_mappings,
            last=torch.tensor([*(start - 1 for start in starts[1:]), *empty], device=device),
            view=view,
        )

    def commit(self, batch: PagedBatch) -> None:
        """The step has run: full pages of its requests may be found by others."""
        for request in batch.requests:
            for group, sequence in zip(self.cache.groups, self._get(request), strict=True):
                group.pool.commit(sequence)

    def _get(self, request: int) -> list[int]:
        if request not in self._sequences:
            raise UnknownSequenceError(f"request {request!r} is not open here")
        return self._sequences[request]

    def _add(self, sequences: list[int]) -> int:
        self._sequences[self._next] = sequences
        self._next += 1
        return self._next - 1
