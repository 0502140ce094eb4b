"""Gears: the few sizes that a dynamic dimension is padded to, so that few graphs serve all sizes.

A size beyond the largest gear is never an error: it takes the largest gear times a power of two, so that the
number of graphs stays logarithmic however long the inputs become.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F

from ascend_dynamo.cache.buckets import optimal_buckets
from ascend_dynamo.errors import OptionError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size`` (size >= 1)."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class Gears:
    """The gears of each named dimension: ascending sizes, ``"pow2"`` or ``"multiple:N"``; hashable."""

    dims: tuple[tuple[str, tuple[int, ...] | str], ...] = ()

    @classmethod
    def parse(cls, spec: Mapping[str, Any]) -> Gears:
        """From ``{"batch": [1, 2, 4], "seq": "pow2", "kv": "multiple:128"}``; else OptionError."""
        return cls(tuple(sorted((_name(dim), _rule(dim, rule)) for dim, rule in spec.items())))

    @classmethod
    def from_histogram(cls, histograms: Mapping[str, Mapping[int, int]], k: int) -> Gears:
        """For each dimension the at most ``k`` sizes that waste least on the given {size: count}."""
        return cls.parse({dim: list(optimal_buckets(h, k).sizes) for dim, h in histograms.items()})

    def __contains__(self, dim: str) -> bool:
        return any(name == dim for name, _ in self.dims)

    def sizes(self, dim: str) -> tuple[int, ...]:
        """The sizes listed for a dimension; empty if it follows a rule or has no gears."""
        rule = dict(self.dims).get(dim, ())
        return rule if isinstance(rule, tuple) else ()

    def pick(self, dim: str, size: int) -> int:
        """The size to pad to: the smallest gear that holds ``size``.

        Size 0 and dimensions without gears keep their exact size. Above the largest listed gear it is that
        gear times a power of two. ValueError for a negative size.
        """
        if size < 0:
            raise ValueError(f"a dimension cannot have size {size}")
        rule = dict(self.dims).get(dim)
        if rule is None or size == 0:
            return size
        if rule == "pow2":
            return _power_of_two(size)
        if isinstance(rule, str):
            step = int(rule.partition(":")[2])
            return -(-size // step) * step
        largest = rule[-1]
        if size > largest:
            return largest * _power_of_two(-(-size // largest))
        return next(gear for gear in rule if gear >= size)


def _name(dim: Any) -> str:
    if isinstance(dim, str) and dim:
        return dim
    raise OptionError(f'option "gears": {dim!r} is not the name of a dimension, such as "batch" or "seq"')


def _rule(dim: str, rule: Any) -> tuple[int, ...] | str:
    if isinstance(rule, str):
        head, _, step = rule.partition(":")
        if rule == "pow2" or (head == "multiple" and step.isdecimal() and int(step) > 0):
            return rule
    elif type(rule) is int and rule > 0:
        return (rule,)
    elif isinstance(rule, (list, tuple, range)) and len(rule) and all(type(n) is int and n > 0 for n in rule):
        return tuple(sorted(set(rule)))
    raise OptionError(
        f'option "gears": {rule!r} is not legal for "{dim}"; use positive sizes such as [1, 2, 4], "pow2" or'
        ' "multiple:N"'
    )


def pad(tensor: torch.Tensor, dim: int, to: int, value: float = 0) -> torch.Tensor:
    """``tensor`` made ``to`` long along ``dim`` by ``value`` at the end; itself if it is that long already.

    Same dtype and device. ValueError if it is longer than ``to``.
    """
    missing = to - tensor.shape[dim]
    if missing < 0:
        raise ValueError(f"cannot pad dimension {dim} of size {tensor.shape[dim]} to {to}: use a larger gear")
    if missing == 0:
        return tensor
    after = tensor.dim() - 1 - dim % tensor.dim()
    return F.pad(tensor, [0, 0] * after + [0, missing], value=value)


def trim(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The first ``size`` entries along ``dim``: a view that undoes ``pad``. ValueError if there are fewer."""
    if size > tensor.shape[dim]:
        raise ValueError(f"cannot trim dimension {dim} of size {tensor.shape[dim]} to {size}")
    return tensor if size == tensor.shape[dim] else tensor.narrow(dim, 0, size)


class LRU(Generic[K, V]):
    """At most ``capacity`` entries; the least recently used leaves first, told to ``on_evict(key, value)``.

    Safe to use from several threads. ``on_evict`` runs outside the lock, so it may use the cache itself.
    """

    def __init__(self, capacity: int, on_evict: Callable[[K, V], object] | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"the capacity of a cache must be at least 1, not {capacity}")
        self.capacity = capacity
        self._on_evict = on_evict
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, default: V | None = None) -> V | None:
        """The entry, now the most recently used one; ``default`` if there is none."""
        with self._lock:
            if key not in self._entries:
                return default
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: K, value: V) -> None:
        """Add or replace an entry; a replaced or displaced value is told to ``on_evict``."""
        with self._lock:
            gone = [(key, self._entries.pop(key))] if key in self._entries else []
            self._entries[key] = value
            if len(self._entries) > self.capacity:
                gone.append(self._entries.popitem(last=False))
        self._tell(gone)

    def clear(self) -> None:
        """Evict everything, oldest first."""
        with self._lock:
            gone = list(self._entries.items())
            self._entries.clear()
        self._tell(gone)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        """Keys from the least to the most recently used, as they were at the call."""
        with self._lock:
            return iter(list(self._entries))

    def _tell(self, gone: list[tuple[K, V]]) -> None:
        if self._on_evict is not None:
            for key, value in gone:
                self._on_evict(key, value)
