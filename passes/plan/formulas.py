"""The cost model's formulas as a report prints them, in MathML, with this plan's machine filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sympy.printing.mathml import mathml

from costmodel import symbolic
from costmodel.hardware import Link
from costmodel.hardware_file import hardware_of


@dataclass(frozen=True)
class Formula:
    """`name` = `math` (presentation MathML, without the `<math>` around it); `note` says of what and from where."""

    name: str
    math: str
    note: str


@lru_cache
def ring_formulas() -> tuple[Formula, ...]:
    """What a collective takes on one kind of link."""
    return (
        Formula("all_gather, reduce_scatter", _math(symbolic.ring_s()), "seconds of S bytes over n ranks"),
        Formula("all_reduce, as a ring", _math(symbolic.ring_all_reduce_s()), "seconds of S bytes over n ranks"),
    )


def link_figures(figures: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The symbols of `ring_formulas` on the hardware that a plan keeps."""
    machine = hardware_of(figures, "plan")
    found = [(f"{where} ({link.name})", _link(link)) for where, link in _links(machine.intra_node, machine.inter_node)]
    return (*found, ("device", f"μ = {machine.device.memory_bytes_per_s / 1e9:,.0f} GB/s"))


def _links(inside: Link, between: Link) -> tuple[tuple[str, Link], ...]:
    return ("inside a node", inside), ("between nodes", between)


def _link(link: Link) -> str:
    micro = {"α": link.latency_s, "π": link.pipeline_s, "γ": link.base_s}
    times = ", ".join(f"{symbol} = {seconds * 1e6:.3g} us" for symbol, seconds in micro.items())
    return f"{times}, β = {link.bytes_per_s / 1e9:,.4g} GB/s"


@lru_cache
def published_formulas() -> tuple[Formula, ...]:
    """The closed forms that the cost model is held to, with their sources."""
    return tuple(
        Formula(
            form.name.replace("_", " "),
            _math(form.expression),
            f"{form.unit}; {form.note + '; ' if form.note else ''}{form.source}",
        )
        for form in symbolic.closed_forms()
    )


def _math(expression: Any) -> str:
    text: str = mathml(expression, printer="presentation")
    return text
