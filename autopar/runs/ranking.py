"""What a search found, as people read it: the verdict, then the ranking."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from costmodel.memory import gib
from passes.plan.report_text import step_text
from passes.plan.tables import terminal_width, text_table

if TYPE_CHECKING:
    from autopar.runs.search_result import Candidate, SearchResult
    from passes.runs.setup import Setup

NEAREST = 5
"""So many that do not fit are shown."""
_HEADERS = ("", "dp x shard x tp", "pp", "cp", "ep", "batch", "recompute", "gathered", "step", "{}/s/GPU", "memory",
            "over budget", "priced only")  # fmt: skip
_NUMBERS = (0, 2, 3, 4, 8, 9, 10)
_LESS = ((9,), (9, 0), (9, 0, 6))
"""Columns that a narrow terminal goes without."""
_SOLVED = "*"
_COLUMNS = {
    "dp x shard x tp": "ranks that replicate the state x that shard it x that split the computation",
    "pp": "pipeline stages / parts of the model on each, taken in turn",
    "cp": "ranks that split the sequence inside attention",
    "ep": "ranks that share a layer's experts, of those that have the same layers; tokens are sent to them; beside: "
    "while another micro-batch is computed (DualPipe, Megatron-LM's --overlap-moe-expert-parallel-comm)",
    "batch": "samples per micro-batch x micro-batches per step",
    "recompute": "full, whole: layers are run again to their end, what they send too, as checkpointing does",
    "gathered": "kept: parameters stay from forward to backward, others are freed and gathered again; again: so are "
    "activations, others stay",
    "priced only": "what of it no plan does yet",
}


def ranking_text(result: SearchResult, name: str | None, top: int) -> str:
    """The verdict and the ranking, as wide as the terminal; `name` is what the model is called."""
    where = f", sequence {result.sequence}" if result.sequence else ""
    rest = "none of the others fits and takes 1% less than one of its mesh that was"
    if result.bound_s < math.inf:
        rest = (
            f"none of the others takes less than {step_text(result.bound_s)}, or 1% less than one of its mesh that was"
        )
    table = ranking_table(result, top)
    lines = [
        f"{name or result.model} on {result.gpus} x {result.hardware}, global batch {result.global_batch}{where}; "
        f"{gib(result.budget_bytes)} per GPU",
        "",
        *result.verdict.text,
        "",
        table,
        "",
        *_columns(result, top),
        f"{result.counted} candidates were considered, schedules of {result.played} played; {rest}",
        *(f"- {note}" for note in result.notes),
    ]
    return "\n".join(line if line is table else _filled(line) for line in lines)


def ranking_table(result: SearchResult, top: int | None = None) -> str:
    """The fastest that fit, and the nearest that do not."""
    rows = [_row(i + 1, c, result) for i, c in enumerate(result.candidates[:top])]
    counted = "tokens" if result.sequence else "samples"
    text = _table(rows, counted) if rows else "nothing fits"
    large = [_row(0, c, result) for c in result.too_large[:NEAREST]]
    return f"{text}\n\nDoes not fit, nearest first:\n{_table(large, counted)}" if large else text


def _filled(line: str) -> str:
    return textwrap.fill(line, terminal_width(), subsequent_indent="  ", break_on_hyphens=False) if line else line


def _columns(result: SearchResult, top: int) -> list[str]:
    """What the columns are that do not say it themselves."""
    setups = [c.setup for c in (*result.candidates[:top], *result.too_large[:NEAREST])]
    left_out = {name for name in ("pp", "cp", "ep") if all(getattr(setup, name) == 1 for setup in setups)}
    if all(setup.reshard and not setup.gathers_again for setup in setups):
        left_out.add("gathered")
    if not any(setup.runs_whole for setup in setups):
        left_out.add("recompute")
    lines = [f"{column}: {meaning}" for column, meaning in _COLUMNS.items() if column not in left_out]
    if any(setup.solved for setup in setups):
        lines.insert(1, f"{_SOLVED}: ranks that split the computation as the solver found, others as Megatron-LM does")
    return lines


def _table(rows: Sequence[Sequence[str]], counted: str) -> str:
    """As wide as the terminal, without columns that say nothing, and without others where it is too narrow for them."""
    said = [i for i in range(len(_HEADERS)) if any(row[i] for row in rows)]
    lines: list[str] = []
    for left_out in ((), *_LESS):
        kept = [i for i in said if i not in left_out]
        cells = [[row[i] for i in kept] for row in rows]
        right = [place for place, i in enumerate(kept) if i in _NUMBERS]
        headers = [_HEADERS[i].format(counted) for i in kept]
        widths = [max(len(row[place]) for row in cells) for place in range(len(kept))]
        longest = widths.index(max(widths))
        width = terminal_width()
        lines = text_table(cells, headers, width, shrink=[longest], right=right, narrowest=len("parallelism,"))
        if max(map(len, lines)) <= terminal_width():
            break
    return "\n".join(lines)


def _row(rank: int, candidate: Candidate, result: SearchResult) -> list[str]:
    setup = candidate.setup
    speed = result.global_batch * (result.sequence or 1) / candidate.step_time_s / result.gpus
    return [
        str(rank) if rank else "",
        f"{setup.dp_replicate} x {setup.dp_shard} x {setup.tp}{_SOLVED * setup.solved}",
        (f"{setup.pp}" + (f"/{setup.virtual}" if setup.virtual > 1 else "")) if setup.pp > 1 else "",
        str(setup.cp) if setup.cp > 1 else "",
        f"{setup.ep}{', beside' * setup.experts_beside}" if setup.ep > 1 else "",
        f"{setup.micro_batch} x {setup.accumulate}",
        "full, whole" if setup.runs_whole else setup.recompute,
        ", ".join(gathered_words(setup)),
        step_text(candidate.step_time_s),
        f"{speed:.0f}",
        gib(candidate.peak_memory_bytes),
        "" if candidate.fits else gib(candidate.over_bytes),
        ", ".join(candidate.priced_only),
    ]


def gathered_words(setup: Setup) -> list[str]:
    """What becomes of gathered parameters and activations, where it is not the usual."""
    return [*([] if setup.reshard else ["kept"]), *(["again"] if setup.gathers_again else [])]
