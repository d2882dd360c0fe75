"""Pins: what a user fixes of parameters, by name pattern."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from costmodel.layout import Layout, Partial, layout_text
from passes.analysis.analysis import Analysis
from passes.analysis.layers import layer_pattern, unique


class PinError(ValueError):
    """A program, as it is padded, has no layout that a pin asks for; padded otherwise it may have."""


@dataclass(frozen=True)
class Pin:
    """What a user fixes of a parameter: its layout in compute and, if given, at rest."""

    in_compute: Layout
    at_rest: Layout | None = None

    def __str__(self) -> str:
        before = "" if self.at_rest is None else f"{layout_text(self.at_rest)} -> "
        return before + layout_text(self.in_compute)


def check_pins(pins: Mapping[str, Layout | Pin], axes: int) -> None:
    """Refuse pins that no graph could take on a mesh of so many axes.

    Raises:
        ValueError: one that has not one placement per axis, or asks for a partial sum.
    """
    for pattern, wanted in pins.items():
        pin = wanted if isinstance(wanted, Pin) else Pin(wanted)
        for layout in (pin.in_compute, pin.at_rest):
            if layout is not None and len(layout) != axes:
                raise ValueError(
                    f"pin {pattern!r}: {layout_text(layout)} has {_counted(len(layout), 'placement')}, but the mesh "
                    f"has {_counted(axes, 'axis', 'axes')}; write one placement per axis"
                )
            if layout is not None and any(isinstance(placement, Partial) for placement in layout):
                raise ValueError(
                    f"pin {pattern!r}: {layout_text(layout)}, but a parameter is no partial sum; write R or S(dim)"
                )


def pinned_layouts(analysis: Analysis, pins: Mapping[str, Layout | Pin], axes: int) -> dict[int, tuple[str, Pin]]:
    """Site -> (pattern, pin) for every parameter that a pin names.

    A pattern that is the name of a plan's line (`parameter_lines`) names that line alone. Where parameters lie
    somewhere already, layers that were pinned apart may be laid out alike, as none of them is trained; a pin of only
    some of these layers is then left out.

    Raises:
        ValueError: a pin that names nothing, some of the parameters that repeated layers share, or one that another pin
            fixes otherwise; what `check_pins` refuses.
    """
    check_pins(pins, axes)
    if not pins:
        return {}
    tied: dict[str, list[str]] = {}
    for alias, first in analysis.program.aliases.items():
        tied.setdefault(first, []).append(alias)
    given = analysis.program.placeholders
    found: dict[int, tuple[str, Pin]] = {}
    lines, laid = parameter_lines(analysis), bool(analysis.program.stored)
    for pattern, wanted in pins.items():
        pin = wanted if isinstance(wanted, Pin) else Pin(wanted)
        named = False
        for index in [lines[pattern]] if pattern in lines else lines.values():
            names = [given[node].name for node in analysis.folding.members[index]]
            matching = [n for n in names if any(fnmatchcase(each, pattern) for each in (n, *tied.get(n, ())))]
            matching = names if pattern in lines else matching
            if not matching:
                continue
            if len(matching) < len(names):
                if laid:
                    continue
                other = next(name for name in names if name not in matching)
                raise ValueError(
                    f"pin {pattern!r} names {matching[0]} but not {other}; repeated layers are laid out alike: name "
                    "all of them, as in 'layers.*'"
                )
            named = True
            other_pattern, other_pin = found.setdefault(index, (pattern, pin))
            if other_pin != pin:
                raise ValueError(
                    f"pins {other_pattern!r} and {pattern!r} both name {matching[0]}, and ask for {other_pin} and "
                    f"{pin}; give one"
                )
        if not named and not laid:
            known = [entry.name for entry in given.values() if entry.kind == "parameter"]
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.3)
            raise ValueError(
                f"pin {pattern!r} names no parameter of the model; "
                + (f"the nearest name is {near[0]}" if near else f"its parameters are {', '.join(known[:5])}, ...")
            )
    return found


def parameter_lines(analysis: Analysis) -> dict[str, int]:
    """The lines that a plan has of parameters, by name: `layers.*.up.weight`, and `layers.*.up.weight#2` where layers
    are not all laid out alike; each with its site."""
    pattern = layer_pattern(analysis.program)
    found: dict[str, int] = {}
    for index in range(len(analysis.folding.members)):
        place = analysis.places[index]
        if place.parameter is not None:
            found[unique(pattern(place.name), found)] = index
    return found


def _counted(number: int, one: str, many: str = "") -> str:
    """`1 axis`, `2 axes`."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"
