"""Rows taken in turns, and what a tensor has of them: one turn's, a sum of some turns', or all in their places."""

from __future__ import annotations

from dataclasses import dataclass


class MattersError(Exception):
    """Results depend on which rows share a turn. Arguments: the source line, and the reason."""


@dataclass(frozen=True)
class Turns:
    """Cuts of `rows` rows into turns; `starts` has the first row of each turn, beginning with 0."""

    rows: int
    starts: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last row of each turn."""
        return (*self.starts[1:], self.rows)

    def length(self, turn: int) -> int:
        """Number of rows in a turn."""
        return self.ends[turn] - self.starts[turn]

    def turn(self, start: int, end: int, rows: int) -> int | None:
        """The turn that covers rows `start` to `end` of a tensor with `rows` rows, a multiple of `self.rows`; None
        where there is none."""
        each = rows // self.rows
        if rows % self.rows or start % each or start // each not in self.starts:
            return None
        found = self.starts.index(start // each)
        return found if self.ends[found] * each == end else None


@dataclass(frozen=True)
class Own:
    """What is made of one turn's rows. `dims`: of each result, the dim whose outermost part they are; None where it is
    a sum over all of them. `key`: equal for what is made alike in several turns. `terms`: keys of what it is the sum
    of, beside what all turns share."""

    turn: int
    dims: tuple[int | None, ...]
    key: int
    terms: tuple[int, ...]


@dataclass(frozen=True)
class Sum:
    """A sum of what some turns make, none of it rows that lie in their turn alone; `terms`: (key, turn) of each."""

    terms: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Written:
    """A tensor to which these turns' rows were written, made alike; `key` of what."""

    turns: frozenset[int]
    key: int


@dataclass(frozen=True)
class Listed:
    """A sum of each turn's rows, made alike, in a dim of their own."""

    dim: int


State = Own | Sum | Written | Listed
