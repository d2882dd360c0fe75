"""A plan as text for a terminal: the decision first, then time, memory, baselines, the ledger, and what is not proved.

Layers are folded (`layers.0-31`), dims have the names people use, and every table fits the width it is given.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from costmodel.memory import gib
from passes.schedule import Collective

if TYPE_CHECKING:
    from passes.plan import AxisRole, Plan

RECOMPUTED = {
    "none": "nothing",
    "pointwise": "pointwise ops (recompute 'pointwise')",
    "selective": "pointwise ops and the attention core (recompute 'selective')",
    "full": "all of a layer but its collectives, from the layer's input (recompute 'full')",
}
"""A plan's `recompute` in words."""
MEMORY_KINDS = {
    "parameters": "as they are stored between steps",
    "optimizer": "the optimizer's states",
    "gathered": "parameters whole for compute",
    "gradients": "of the parameters",
    "activations": "kept from forward for backward",
    "working": "temporary results",
    "communication": "what collectives read and write",
    "inputs": "what the step is given",
    "buffers": "the model's own",
}
"""What a kind of memory is, in words."""
_LEDGER_LINES = 24
_TOP_TENSORS = 8


def plan_text(plan: Plan, width: int | None = None) -> str:
    """The report on `plan`, at most `width` columns wide (default: the terminal's, at least 80 and at most 140)."""
    width = width or terminal_width()
    sections = [
        _head(plan, width),
        _decided(plan, width),
        _time(plan, width),
        _memory(plan, width),
        _baselines(plan, width),
        _ledger(plan, width),
        _open_ends(plan, width),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


# -- pieces ------------------------------------------------------------------------------------------------------------


def seconds_text(seconds: float) -> str:
    """`12.3 ms` and the like, three digits."""
    if seconds < 5e-9:
        return "0"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * scale or unit == "us":
            scaled = seconds / scale
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f} {unit}"
    raise AssertionError(seconds)


def terminal_width() -> int:
    """Columns to write in: the terminal's, at least 80; 100 where there is none; at most 140."""
    return min(140, max(80, shutil.get_terminal_size((100, 24)).columns))


def cut(text: str, width: int) -> str:
    """`text`, its middle left out where it is wider than `width`."""
    if len(text) <= width:
        return text
    left = max(1, (width - 1) // 3)
    return f"{text[:left]}~{text[len(text) - (width - 1 - left) :]}"


def percent_text(share: float) -> str:
    """`12%`; `<1%` for what would read 0%."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def _part(share: float) -> str:
    return "all parameters" if share > 0.995 else f"{percent_text(share)} of the parameters"


def _title(text: str, width: int) -> str:
    return f"-- {text} " + "-" * max(0, min(width, 100) - len(text) - 4)


def text_table(
    rows: Sequence[Sequence[str]], headers: Sequence[str], width: int, *, shrink: int, right: Iterable[int] = (),
    indent: int = 2,
) -> list[str]:  # fmt: skip
    """Lines of a table; column `shrink` gives way where the table is wider than `width`."""
    numbers = set(right)
    align = ["right" if column in numbers else "left" for column in range(len(headers))]
    columns = [max(len(row[c]) for row in [headers, *rows]) for c in range(len(headers))]
    room = max(12, width - indent - sum(columns) + columns[shrink] - 2 * (len(headers) - 1))
    columns[shrink] = min(columns[shrink], room)
    short = [[cut(cell, room) if c == shrink else cell for c, cell in enumerate(row)] for row in rows]
    # The header is a row like others: tabulate makes columns with real headers wider than they need to be.
    body = [headers, ["-" * columns[c] for c in range(len(headers))], *short]
    text = tabulate(body, tablefmt="plain", colalign=align, disable_numparse=True)
    return [f"{' ' * indent}{line}".rstrip() for line in text.splitlines()]


def _wrap(text: str, width: int, indent: str) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(indent) + len(line) + 1 + len(word) > width:
            lines.append(indent + line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, indent + line] if line else lines


# -- sections ----------------------------------------------------------------------------------------------------------


def title_text(plan: Plan) -> str:
    """`Plan 'ddp', chosen by 'auto', on dp=2 x tp=2`."""
    mesh = " x ".join(f"{name}={size}" for name, size in plan.axes) or "one device"
    asked = plan.options.get("strategy", plan.strategy)
    chosen = f", chosen by {asked!r}," if asked != plan.strategy else ""
    return f"Plan {plan.strategy!r}{chosen} on {mesh}"


def bound_text(plan: Plan) -> str:
    """What the solver proved, and what it did not; "" where it was not asked."""
    bound = plan.bound
    if not bound.seconds:
        return ""
    each = " of a micro-batch" if plan.accumulate > 1 else ""
    lowest = "is the lowest there is" if bound.gap < 1e-9 else f"is within {bound.gap:.2%} of the lowest there is"
    return (
        f"Proved: the sum of all costs{each}, {seconds_text(bound.seconds)} with no overlap counted, {lowest} under "
        f"{plan.strategy!r}. Not proved: that no layout is faster with overlap"
        + (f"; {bound.note}." if bound.note else ".")
    )


def _head(plan: Plan, width: int) -> list[str]:
    machine, *axes = plan.machine or ("",)
    where = f" ({machine})" if machine else ""
    batch = f", batch over {', '.join(plan.batch_axes)}" if plan.batch_axes else ""
    budget = f" of {gib(plan.memory_budget_bytes)}" if plan.memory_budget_bytes is not None else ""
    fits = "" if plan.fits else "  DOES NOT FIT"
    step = f"{seconds_text(plan.step_time_s)} per step"
    if plan.accumulate > 1:
        step += f" of {plan.accumulate} micro-batches"
    first, *more = _wrap(f"{title_text(plan)}{where}{batch}", width - 2, "")
    return [
        first,
        *(f"  {line}" for line in more),
        f"  {step}, {gib(plan.peak_memory_bytes)}{budget} per rank{fits}",
        *(line for text in axes for line in _wrap(text, width, "  ")),
    ]


def _decided(plan: Plan, width: int) -> list[str]:
    lines = [_title("What was decided", width)]
    for name, size in plan.axes:
        label = f"  {name} ({size}) "
        first, *rest = _wrap(role_text(plan.roles[name]), width - len(label), "") or [""]
        lines += [f"{label}{first}", *(" " * len(label) + line for line in rest)]
    rows = []
    for placed in plan.parameters.values():
        dims = f"[{', '.join(placed.dims)}]"
        rows.append(
            [placed.names.replace(".weight", ""), dims, f"{placed}{', pinned' * placed.pinned}", gib(placed.bytes)]
        )
    lines.append("")
    headers = ["parameter", "dims", "at rest -> compute", "per rank"]
    needed = sum(max(len(row[c]) for row in [headers, *rows]) for c in range(4)) + 2 * 4
    if needed > width:
        others = sum(max(len(row[c]) for row in [headers, *rows]) for c in range(1, 4))
        rows = _by_layer(rows, width - 2 * 4 - others)
    lines += text_table(rows, headers, width, shrink=0, right=[3])
    for other, name in plan.aliases.items():
        lines.append(f"  {other} is tied to {name}")
    return lines


def _by_layer(rows: Sequence[Sequence[str]], room: int) -> list[list[str]]:
    """The rows with what repeated layers share of their names on a line of its own, as are names longer than `room`."""
    found: list[list[str]] = []
    last = ""
    for name, *cells in rows:
        match = re.match(r"(.*?\.\d+-[\d,-]+)\.(.+)", name)
        layers, rest = (match[1], f".{match[2]}") if match else ("", name)
        if layers and layers != last:
            found.append([layers, "", "", ""])
        last = layers
        while len(rest) > room and "." in rest[1:room]:
            cut_at = rest.rindex(".", 1, room)
            found.append([rest[:cut_at], "", "", ""])
            rest = rest[cut_at:]
        found.append([rest, *cells])
    return found


def role_text(role: AxisRole) -> str:
    """What an axis does, in a sentence."""
    products, others = _shares_text(role.products), _shares_text(role.others)
    parts = []
    if products == others:
        parts.append(f"computes {products}")
    else:
        parts.append(f"matrix products {products}")
        if role.others:
            parts.append(f"other ops {others}")
    if role.split:
        parts.append(f"{_part(role.split)} split for compute")
    if role.stored:
        parts.append(f"{_part(role.stored)} split at rest and gathered for compute")
    if not role.split and not role.stored:
        parts.append("parameters on every rank")
    return "; ".join(parts)


def _shares_text(shares: Mapping[str, float]) -> str:
    named = [(word, share) for word, share in shares.items() if share >= 0.01][:5]
    if len(named) == 1:
        word = named[0][0]
        return "whole on every rank" if not word else f"on {word}" if word == "partial sums" else f"split along {word}"
    texts = []
    for word, share in named:
        texts.append(f"{word or 'whole on every rank'} {percent_text(share)}")
    return "split along " + ", ".join(texts) if texts else "nothing"


def _time(plan: Plan, width: int) -> list[str]:
    parts, times = plan.breakdown, plan.accumulate
    rows = []
    kinds = ", ".join(f"{kind} {seconds_text(s * times)}" for kind, s in parts.compute_by_kind.items() if s)

    def row(name: str, seconds: float, note: str = "") -> None:
        share = seconds / plan.step_time_s if plan.step_time_s else 0.0
        rows.append([name, seconds_text(seconds), percent_text(share), note])

    row("compute", parts.compute_s * times, kinds)
    if parts.contention_s:
        row("compute slowed", parts.contention_s * times, "by collectives that run beside it")
    for group in parts.exposed_s:
        exposed, hidden = parts.exposed_s[group] * times, parts.hidden_s[group] * times
        row(f"exposed {group}", exposed, f"and {seconds_text(hidden)} hidden behind compute")
    row("optimizer", parts.optimizer_s, "once per step" if times > 1 else "")
    return [
        _title("Time per step" + (f" of {times} micro-batches" if times > 1 else ""), width),
        *text_table(rows, ["", "time", "share", ""], width, shrink=3, right=[1, 2]),
    ]


def _memory(plan: Plan, width: int) -> list[str]:
    parts = plan.breakdown
    budget = plan.memory_budget_bytes
    title = f"Memory per rank: peak {gib(plan.peak_memory_bytes)}"
    if budget is not None:
        title += f" of {gib(budget)}"
    rows = [
        [kind, gib(size), percent_text(size / (plan.peak_memory_bytes or 1)), MEMORY_KINDS.get(kind, "")]
        for kind, size in parts.memory_bytes.items()
        if size >= 0.001 * plan.peak_memory_bytes
    ]
    lines = [_title(title, width), *_wrap(f"the peak is at {parts.peak_moment}", width, "  ")]
    lines += _wrap(f"backward computes again: {RECOMPUTED[plan.recompute]}", width, "  ")
    if not plan.reshard:
        lines += _wrap("gathered parameters stay from forward to backward (reshard_after_forward=False)", width, "  ")
    if not plan.postpone:
        lines += _wrap("weight gradients run at once, not beside what is sent next, for memory's sake", width, "  ")
    lines += text_table(rows, ["kind", "bytes", "share", ""], width, shrink=0, right=[1, 2])
    rows = [
        [top.name, f"x{top.count}" if top.count > 1 else "", top.kind, gib(top.bytes)]
        for top in parts.top_tensors[:_TOP_TENSORS]
    ]
    lines += ["", *text_table(rows, ["largest tensors then", "", "kind", "bytes"], width, shrink=0, right=[3])]
    return lines


def _baselines(plan: Plan, width: int) -> list[str]:
    if not plan.baselines:
        return []
    rows = [
        [
            f"this plan ({plan.strategy})",
            seconds_text(plan.step_time_s),
            "",
            gib(plan.peak_memory_bytes),
            _fits(plan.fits, ""),
        ]
    ]
    for name, other in plan.baselines.items():
        known = other.step_time_s < float("inf")
        times = other.step_time_s / plan.step_time_s if plan.step_time_s else 1.0
        rows.append(
            [
                name,
                seconds_text(other.step_time_s) if known else "-",
                f"{times:.2f}x" if known else "-",
                gib(other.peak_memory_bytes) if known else "-",
                _fits(other.fits, other.reason),
            ]
        )
    headers = ["plan", "step", "", "memory", "fits"]
    return [
        _title("Beside the plans made by hand", width),
        *text_table(rows, headers, width, shrink=4, right=[1, 2, 3]),
    ]


def _fits(fits: bool, reason: str) -> str:
    return "yes" if fits else f"no: {reason.split(',')[0]}" if reason else "no"


def _ledger(plan: Plan, width: int) -> list[str]:
    if not plan.collectives:
        return [_title("Collectives: none", width)]
    total = sum(each.count for each in plan.collectives)
    lines = [_title(f"Collectives: {total} per {'micro-batch' if plan.accumulate > 1 else 'step'}", width)]
    state = [each for each in plan.collectives if each.role != "activation"]
    rest = [each for each in plan.collectives if each.role == "activation"]
    headers = ["collective", "axes", "phase", "of", "count", "bytes", "time", "exposed"]
    right = [4, 5, 6, 7]
    if state:
        groups: dict[tuple[str, str, str, str], list[Collective]] = defaultdict(list)
        for each in state:
            groups[each.kind, each.group, each.phase, _state_text(each)].append(each)
        rows = [_row(kind, group, phase, what, alike) for (kind, group, phase, what), alike in groups.items()]
        lines += ["  State:", *text_table(rows, headers, width, shrink=3, right=right)]
    if rest:
        lines += [*([""] if state else []), "  Activations, with the reason and the line of the model:"]
        rows = [_row(e.kind, e.group, e.phase, e.module or "(model)", [e]) for e in rest[:_LEDGER_LINES]]
        table = text_table(rows, headers, width, shrink=3, right=right)
        lines += table[:2]
        for line, each in zip(table[2:], rest, strict=False):
            why = f"{each.reason}  ({each.source})" if each.source else each.reason
            lines += [line, *_wrap(why, width, "      ")]
        if len(rest) > _LEDGER_LINES:
            left = rest[_LEDGER_LINES:]
            seconds = sum(each.seconds for each in left)
            lines.append(f"  ... and {sum(each.count for each in left)} more, {seconds_text(seconds)} in all")
    return lines


def _row(kind: str, group: str, phase: str, what: str, alike: Sequence[Collective]) -> list[str]:
    return [
        kind,
        group,
        {"forward": "fwd", "backward": "bwd"}.get(phase, phase),
        what,
        str(sum(each.count for each in alike)),
        gib(sum(each.bytes * each.count for each in alike)),
        seconds_text(sum(each.seconds for each in alike)),
        seconds_text(sum(each.exposed_s for each in alike)),
    ]


def _state_text(each: Collective) -> str:
    """Whose weights are gathered or gradients reduced: the repeated layer, else the first and how many more."""
    first, *others = each.value.removeprefix("gradient of ").split(", ")
    what = "weights" if each.role == "parameter" else "gradients"
    layer = _layer(first)
    more = f" and {len(others)} more" if others and layer == first else ""
    return f"{what} {layer.removesuffix('.weight')}{more}"


def _layer(name: str) -> str:
    """The repeated layer a name is in, or the name itself."""
    found = re.match(r".*?\.\*", name)
    return found.group(0) if found else name


def _open_ends(plan: Plan, width: int) -> list[str]:
    lines = [_title("What was replicated, padded or not proved", width), *_wrap(bound_text(plan), width, "  ")]
    for note in plan.notes:
        first, *more = _wrap(note, width - 4, "") or [""]
        lines += [f"  - {first}", *(f"    {line}" for line in more)]
    if not plan.notes:
        lines.append("  Every op has a rule; nothing is replicated for want of one.")
    return lines
