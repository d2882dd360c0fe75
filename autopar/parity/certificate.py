"""What `autopar.verify` hands out: every tensor's error against the unmodified model, and where they part."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from textwrap import TextWrapper
from typing import Any, Literal

from passes.parity.bisect import Divergence
from passes.plan.tables import text_table

_ROUNDINGS = 10
"""How many times what one rounding of each parameter makes of a step may be what those of all its ops make."""

_VANISHED = 1e-3
"""Of an error, what rounding may leave of it in float64, whose roundings are 2e-9 of those in float32: some models
compute parts in float32 whatever they are given."""

Kind = Literal["output", "gradient", "parameter", "buffer"]

_TITLES: dict[Kind, str] = {
    "output": "outputs",
    "gradient": "gradients",
    "parameter": "parameters after a step",
    "buffer": "buffers",
}


@dataclass(frozen=True)
class Tolerances:
    """Relative errors that rounding may make; None: 1e-5 and 1e-4, or 2e-2 and 5e-2 below 32-bit precision.

    loss: of scalar outputs. gradient: of every other tensor, of the norm.
    """

    loss: float | None = None
    gradient: float | None = None


@dataclass(frozen=True)
class TensorError:
    """A tensor of the simulated ranks, put together, against the reference.

    `error` is the norm of the difference over the norm of the reference's tensor, or over `floor` where that is larger:
    a loss, gradient or buffer that is zero but for rounding has no relative error worth the name.
    """

    kind: Kind
    name: str
    shape: tuple[int, ...]
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is as near as it has to be."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Parity:
    """A certificate: what all simulated ranks computed in a step, against one device given the whole batch."""

    model: str
    parameters: int
    dtype: str
    training: bool
    axes: tuple[tuple[str, int], ...]
    batch_size: int
    batch_ranks: int
    strategy: str
    hardware: str
    fingerprint: str
    seed: int
    reference: str
    """What the ranks were held against, in words."""
    optimizer: str
    """The step that made "parameter" tensors, in words; "" where there is none."""
    collectives: dict[str, int]
    """Kind -> how many a rank issues in the step."""
    tensors: tuple[TensorError, ...]
    divergence: Divergence | None = None
    """The first node at which the ranks part from the captured graph on one device."""
    failure: str = ""
    """What ended the simulation early."""
    captured_error: float | None = None
    """Where the check failed: the worst error of the captured graph on one device against the unmodified model."""
    rounding_error: float | None = None
    """Where the check failed: the worst error of the unmodified model against itself, with each parameter moved by a
    rounding."""
    double_error: float | None = None
    """Where the check failed: the worst error of the ranks against the captured graph on one device, in float64."""
    model_double_error: float | None = None
    """The same of the captured graph on one device against the unmodified model."""
    notes: tuple[str, ...] = ()
    without_randomness: Parity | None = None
    """The same check in eval mode, against the unmodified model, where the step draws random numbers."""

    @property
    def ok(self) -> bool:
        """Whether every tensor is as near as it has to be."""
        own = bool(self.tensors) and not self.failure and all(tensor.ok for tensor in self.tensors)
        return own and (self.without_randomness is None or self.without_randomness.ok)

    @property
    def is_rounding(self) -> bool:
        """Whether the check failed by no more than rounding may make of the unmodified model itself, or by what float64
        makes vanish."""
        worst = max((tensor.error for tensor in self.tensors), default=math.inf)
        if self.ok or not math.isfinite(worst):
            return False
        return worst <= _ROUNDINGS * (self.rounding_error or 0.0) or self._vanishes(worst)

    def _vanishes(self, worst: float) -> bool:
        """Whether what differs by `worst` is a thousandth of it, or less, in float64."""
        parts = (self.double_error, 0.0 if self.captured_error is None else self.model_double_error)
        return all(part is not None and part <= _VANISHED * worst for part in parts)

    @property
    def ranks(self) -> int:
        """How many were simulated."""
        return math.prod(size for _, size in self.axes)

    def worst(self, kind: Kind) -> TensorError | None:
        """The tensor of a kind that is furthest off, of what is allowed."""
        return max(
            (t for t in self.tensors if t.kind == kind), key=lambda t: t.error / (t.tolerance or 1e-30), default=None
        )

    def to_json(self) -> str:
        """All of it; errors that are no numbers are strings ("inf", "nan")."""
        return json.dumps({"format": "autopar-parity", "version": 1, "ok": self.ok, **_plain(asdict(self))}, indent=2)

    def __str__(self) -> str:
        return parity_text(self)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def parity_text(parity: Parity, width: int = 100) -> str:
    """The certificate as text."""
    lines = [f"Parity certificate: {'PASSED' if parity.ok else 'FAILED'}", "", *_facts(_checked(parity), width)]
    if parity.tensors:
        lines += ["", *_by_kind(parity, width)]
    if failed := [t for t in parity.tensors if not t.ok]:
        lines += ["", *_failed(failed, width)]
    if parity.failure:
        lines += ["", *_facts([("failed", parity.failure)], width)]
    if parity.divergence is not None:
        lines += ["", *_facts([("first at", str(parity.divergence))], width)]
    lines += _facts(_why(parity), width)
    if parity.notes:
        lines += ["", *_facts([("note", note) for note in parity.notes], width)]
    if parity.without_randomness is not None:
        inner = parity_text(parity.without_randomness, width - 2)
        lines += ["", "  In eval mode, where nothing is random:", *(f"  {x}".rstrip() for x in inner.splitlines())]
    return "\n".join(lines) + "\n"


_Facts = list[tuple[str, str]]
"""What a line is about, and what it says."""


def _checked(parity: Parity) -> _Facts:
    """What was held against what."""
    mesh = " x ".join(f"{name}={size}" for name, size in parity.axes)
    issued = sum(parity.collectives.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in parity.collectives.items())
    mode = "train" if parity.training else "eval"
    each = f", {parity.batch_size // parity.batch_ranks} for each of {parity.batch_ranks} data-parallel ranks"
    facts = [
        ("model", f"{parity.model}, {parity.parameters:,} parameters, {parity.dtype or 'no dtype'}, {mode} mode"),
        ("mesh", f"{mesh}: {parity.ranks} ranks played in one CPU process, op by op, not compiled"),
        ("plan", f"{parity.strategy!r}, priced for {parity.hardware}; graph {parity.fingerprint[:12]}"),
        ("batch", f"{parity.batch_size}{each if parity.batch_ranks > 1 else ''}; seed {parity.seed}"),
        ("held against", parity.reference),
        ("collectives", f"{issued} on each rank: {kinds}" if issued else "none"),
    ]
    return [*facts, ("step", parity.optimizer)] if parity.optimizer else facts


def _by_kind(parity: Parity, width: int) -> list[str]:
    """How many tensors of each kind are equal, and the worst."""
    rows = []
    for kind, title in _TITLES.items():
        worst = parity.worst(kind)
        if worst is not None:
            all_of = [t for t in parity.tensors if t.kind == kind]
            equal = f"{sum(t.ok for t in all_of)} of {len(all_of)}"
            rows.append([title, equal, f"{worst.error:.1e}", f"{worst.tolerance:.0e}", worst.name or "(the output)"])
    return text_table(rows, ["", "equal", "worst error", "allowed", "worst tensor"], width, shrink=[4, 0])


def _failed(failed: list[TensorError], width: int) -> list[str]:
    """The first ten of those that are not equal."""
    rows = [[t.kind, t.name, str(list(t.shape)), f"{t.error:.2e}", t.note] for t in failed[:10]]
    more = [f"  ... and {len(failed) - 10} more"] if len(failed) > 10 else []
    return [*text_table(rows, ["not equal", "", "shape", "error", ""], width, shrink=[1, 4]), *more]


def _why(parity: Parity) -> _Facts:
    """Of a check that failed: what the capture, roundings and the rewrite each have in it."""
    facts = []
    if parity.captured_error is not None:
        told = f"the captured graph on one device is off by {parity.captured_error:.1e} from the unmodified model"
        facts.append(("capture", told))
    if parity.rounding_error is not None:
        told = f"moving every parameter by one moves the unmodified model itself by {parity.rounding_error:.1e}"
        facts.append(("rounding", told))
    if parity.double_error is not None:
        told = f"the same ops in float64: the ranks are off by {parity.double_error:.1e} from the captured graph"
        if parity.model_double_error is not None:
            told += f", and that by {parity.model_double_error:.1e} from the unmodified model"
        facts.append(("in float64", told))
    if parity.is_rounding:
        facts.append(("so", "what differs may be rounding alone, which this model makes that large"))
    return facts


def _facts(facts: _Facts, width: int) -> list[str]:
    """Each on lines of its own, indented below its label."""
    indent = " " * 16
    wrap = TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    lines = []
    for label, text in facts:
        wrap.initial_indent = f"  {label:<14}"
        lines += wrap.wrap(text)
    return lines
