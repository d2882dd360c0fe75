"""Errors a user can meet; each message names the place, what was found and what would do."""

from __future__ import annotations


class AutoparError(Exception):
    """Base of every error that autopar raises for a reason of its own."""


class CaptureError(AutoparError):
    """The model's step could not be captured as one graph."""


class UnsupportedOpError(AutoparError):
    """An op has no rule and may not be replicated."""


class NoFeasiblePlanError(AutoparError):
    """No plan satisfies the memory budget or the pins.

    `conflict`: a smallest set of constraints that no plan satisfies together; `ways`: changes after which a plan fits,
    with its figures. Both are in the message too.
    """

    def __init__(self, message: str, conflict: tuple[str, ...] = (), ways: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.conflict = conflict
        self.ways = ways


class PlanMismatchError(AutoparError):
    """A plan was made for another graph, mesh or state of the parameters."""
