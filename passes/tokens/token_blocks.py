"""What a model does with tokens of the whole batch at once, done for each part of the batch by itself."""

from __future__ import annotations

from passes.program.program import Program
from passes.tokens.routing import has_routed, route_by_blocks
from passes.tokens.turns import has_turns, take_turns_by_blocks


def has_whole_batch(program: Program) -> bool:
    """Whether the program (as `prepare` left it) routes tokens of the whole batch together, or takes them in turns."""
    return has_routed(program) or has_turns(program)


def by_blocks(program: Program, parts: int) -> Program:
    """The program that routes tokens, and takes them in turns, in each of so many equal parts of the batch.

    What cannot be cut so stays as it is, with a note.
    """
    return take_turns_by_blocks(route_by_blocks(program, parts), parts)
