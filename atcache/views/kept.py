"""Kept: values that are read once and stay in memory, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values read once and then kept in memory, as long as they fit in a budget.

    What was kept first stays: with a new permutation every epoch no other choice would be better, and evicting costs.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self._free_nbytes = budget_nbytes
        self._values: dict[Hashable, Value] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, read: Callable[[], Value], count_nbytes: Callable[[Value], int]) -> Value:
        """The value of `key`, read if it is not kept."""
        value = self._values.get(key)
        if value is None:
            value = read()
            if (nbytes := count_nbytes(value)) <= self._free_nbytes:
                self._free_nbytes -= nbytes
                self._values[key] = value
        return value
