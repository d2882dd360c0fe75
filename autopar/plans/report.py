"""The sharding report in a terminal."""

from __future__ import annotations

from passes.plan.plan import Plan
from passes.plan.report_text import plan_text


def terminal_report(plan: Plan, width: int | None = None) -> str:
    """What was decided, time, memory, baselines, collectives and what is open; `width` defaults to the terminal's."""
    return plan_text(plan, width)
