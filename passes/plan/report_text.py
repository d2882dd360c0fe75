"""A plan as text for a terminal: the decision first, then time, memory, baselines, the ledger, and what is not proved.

Layers are folded (`layers.0-31`), dims have the names people use, and every table fits the width it is given.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from costmodel.memory import gib
from passes.plan.tables import table_width, terminal_width, text_rows, text_table, wrapped_lines
from passes.play.schedule import Collective

if TYPE_CHECKING:
    from passes.plan.plan import AxisRole, Plan

RECOMPUTED = {
    "none": "nothing",
    "pointwise": "pointwise ops (recompute 'pointwise')",
    "selective": "pointwise ops and the attention core (recompute 'selective')",
    "widening": "pointwise ops and products that give more than they read (recompute 'widening')",
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


def step_text(seconds: float) -> str:
    """The same, with hundredths of a second, for steps that are compared."""
    return seconds_text(seconds) if seconds < 1 else f"{seconds:.2f} s"


def percent_text(share: float) -> str:
    """`12%`; `<1%` for what would read 0%."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def _part(share: float) -> str:
    return "all parameters" if share > 0.995 else f"{percent_text(share)} of the parameters"


def _title(text: str, width: int) -> str:
    return f"-- {text} " + "-" * max(0, width - len(text) - 4)


# -- sections ----------------------------------------------------------------------------------------------------------


def title_text(plan: Plan) -> str:
    """`Plan 'ddp', chosen by 'auto', on dp=2 x tp=2`."""
    mesh = " x ".join(f"{name}={size}" for name, size in plan.axes) or "one device"
    asked = plan.options.get("strategy", plan.strategy)
    chosen = f", chosen by {asked!r}," if asked != plan.strategy else ""
    return f"Plan {plan.strategy!r}{chosen} on {mesh}"


def bound_text(plan: Plan) -> str:
    """The solver's proof in a sentence; "" where it was not asked."""
    bound = plan.bound
    if not bound.seconds:
        return ""
    each = " of a micro-batch" if plan.accumulate > 1 else ""
    lowest = "is the lowest there is" if bound.gap < 1e-9 else f"is within {bound.gap:.2%} of the lowest there is"
    return (
        f"Proved: the sum of all costs{each}, {seconds_text(bound.seconds)} {bound.counted}, {lowest} under "
        f"{plan.strategy!r}{bound.among}. Not proved: that no layout is faster with overlap"
        + (f"; {bound.note}." if bound.note else ".")
    )


def kept_texts(plan: Plan) -> list[str]:
    """What backward computes or gathers again, and what stays for it, where that is not the usual; a sentence each."""
    sentences = (
        (f"backward computes again: {RECOMPUTED[plan.recompute]}", True),
        ("gathered parameters stay from forward to backward (reshard_after_forward=False)", not plan.reshard),
        (
            "activations that forward gathered are freed there and gathered again (regather_activations=True)",
            plan.regather,
        ),
        ("weight gradients run at once, not beside what is sent next, for memory's sake", not plan.postpone),
    )
    return [text for text, is_so in sentences if is_so]


def _head(plan: Plan, width: int) -> list[str]:
    machine, *axes = plan.machine or ("",)
    where = f" ({machine})" if machine else ""
    batch = f", batch over {', '.join(plan.batch_axes)}" if plan.batch_axes else ""
    budget = f" of {gib(plan.memory_budget_bytes)}" if plan.memory_budget_bytes is not None else ""
    fits = "" if plan.fits else "  DOES NOT FIT"
    step = f"{seconds_text(plan.step_time_s)} per step"
    if plan.accumulate > 1:
        step += f" of {plan.accumulate} micro-batches"
    first, *more = wrapped_lines(f"{title_text(plan)}{where}{batch}", width - 2, "")
    return [
        first,
        *(f"  {line}" for line in more),
        f"  {step}, {gib(plan.peak_memory_bytes)}{budget} per rank{fits}",
        *(line for text in axes for line in wrapped_lines(text, width, "  ")),
    ]


def _decided(plan: Plan, width: int) -> list[str]:
    lines = [_title("What was decided", width)]
    for name, size in plan.axes:
        label = f"  {name} ({size}) "
        first, *rest = wrapped_lines(role_text(plan.roles[name], size), width - len(label), "") or [""]
        lines += [f"{label}{first}", *(" " * len(label) + line for line in rest)]
    rows = []
    for placed in plan.parameters.values():
        dims = f"[{', '.join(placed.dims)}]"
        rows.append(
            [placed.names.replace(".weight", ""), dims, f"{placed}{', pinned' * placed.pinned}", gib(placed.bytes)]
        )
    if not rows:
        return [*lines, "", "  The model has no parameters."]
    lines.append("")
    headers = ["parameter", "dims", "at rest -> compute", "per rank"]
    if table_width([headers, *rows]) > width:
        rows = _by_layer(rows)
    lines += text_table(rows, headers, width, shrink=[0, 1], right=[3])
    for other, name in plan.aliases.items():
        lines.append(f"  {other} is tied to {name}")
    return lines


def _by_layer(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The rows with what repeated layers share of their names on a line of its own."""
    found: list[list[str]] = []
    last = ""
    for name, *cells in rows:
        match = re.match(r"(.*?\.\d+-[\d,-]+)\.(.+)", name)
        layers, rest = (match[1], f".{match[2]}") if match else ("", name)
        if layers and layers != last:
            found.append([layers, "", "", ""])
        last = layers
        found.append([rest, *cells])
    return found


def role_text(role: AxisRole, ranks: int) -> str:
    """What an axis does, in a sentence."""
    if ranks == 1:
        return "one rank: nothing is split"
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
    kinds = {"": "whole on every rank", "partial sums": "on partial sums"}
    if len(named) == 1:
        word = named[0][0]
        return kinds.get(word, f"split along {word}")
    split = [f"{word} {percent_text(share)}" for word, share in named if word not in kinds]
    others = [f"{kinds[word]} {percent_text(share)}" for word, share in named if word in kinds]
    return ", ".join(["split along " + ", ".join(split)] * bool(split) + others) or "nothing"


def _time(plan: Plan, width: int) -> list[str]:
    parts, times = plan.breakdown, plan.accumulate
    rows = []
    kinds = ", ".join(f"{kind} {seconds_text(s * times)}" for kind, s in parts.compute_by_kind.items() if s)

    def row(name: str, seconds: float, note: str = "") -> None:
        share = seconds / plan.step_time_s if plan.step_time_s else 0.0
        rows.append([name, seconds_text(seconds), percent_text(share), note])

    row("compute", parts.compute_s * times, kinds)
    if parts.slows:
        row("compute slowed", parts.contention_s * times, "by collectives that run beside it")
    for group in parts.exposed_s:
        exposed, hidden = parts.exposed_s[group] * times, parts.hidden_s[group] * times
        row(f"exposed {group}", exposed, f"and {seconds_text(hidden)} hidden behind compute")
    row("optimizer", parts.optimizer_s, "once per step" if times > 1 else "")
    return [
        _title("Time per step" + (f" of {times} micro-batches" if times > 1 else ""), width),
        *text_table(rows, ["", "time", "share", ""], width, shrink=[3], right=[1, 2]),
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
    lines = [_title(title, width), *wrapped_lines(f"the peak is at {parts.peak_moment}", width, "  ")]
    lines += [line for text in kept_texts(plan) for line in wrapped_lines(text, width, "  ")]
    lines += text_table(rows, ["kind", "bytes", "share", ""], width, right=[1, 2])
    rows = [
        [top.name, f"x{top.count}" if top.count > 1 else "", top.kind, gib(top.bytes)]
        for top in parts.top_tensors[:_TOP_TENSORS]
    ]
    lines += ["", *text_table(rows, ["largest tensors then", "", "kind", "bytes"], width, right=[3])]
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
        *text_table(rows, headers, width, shrink=[4, 0], right=[1, 2, 3]),
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
        lines += ["  State:", *text_table(rows, headers, width, shrink=[3, 1], last=[0], right=right)]
    if rest:
        lines += [*([""] if state else []), "  Activations, with the reason and the line of the model:"]
        rows = [_row(e.kind, e.group, e.phase, e.module or "(model)", [e]) for e in rest[:_LEDGER_LINES]]
        head, bodies = text_rows(rows, headers, width, shrink=[3, 1], last=[0], right=right)
        lines += head
        for body, each in zip(bodies, rest, strict=False):
            why = f"{each.reason}  ({each.source})" if each.source else each.reason
            lines += [*body, *wrapped_lines(why, width, "      ")]
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
    """Whose weights are gathered or gradients reduced: the first, or the repeated layer it is in, and how many more."""
    first, *others = each.names
    what = "weights" if each.role == "parameter" else "gradients"
    layer = _layer(first)
    beside = sum(_layer(name) != layer for name in others)
    return f"{what} {layer.removesuffix('.weight')}" + (f" and {beside} more" if beside else "")


def _layer(name: str) -> str:
    """The repeated layer a name is in, or the name itself."""
    found = re.match(r".*?\.\*", name)
    return found.group(0) if found else name


def _open_ends(plan: Plan, width: int) -> list[str]:
    lines = [_title("What was replicated, padded or not proved", width), *wrapped_lines(bound_text(plan), width, "  ")]
    for note in plan.notes:
        first, *more = wrapped_lines(note, width - 4, "") or [""]
        lines += [f"  - {first}", *(f"    {line}" for line in more)]
    if not plan.notes:
        lines.append("  Every op has a rule; nothing is replicated for want of one.")
    return lines
