"""Bytes on one rank: what a parameter keeps all step long, and the peak of what comes and goes.

    at rest      parameters, gradients, optimizer states, master copies            `at_rest`
    over time    buffers with a birth and a last use, played in order              `peak`, `timeline`

The peak names its moment, what is alive then by kind, and the largest tensors, so that a report can say what to change.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

ALLOCATION_BYTES = 512
"""What torch's CUDA caching allocator rounds every request up to."""


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """What an optimizer keeps per parameter.

    `state_bytes_per_param` are its states; `master_bytes_per_param` a copy of the parameter in higher precision, where
    the parameters themselves are stored in a lower one. `factored`: a matrix keeps one fp32 value per row and column
    instead (Adafactor), anything else `state_bytes_per_param`.
    """

    name: str
    state_bytes_per_param: float
    master_bytes_per_param: float = 0.0
    factored: bool = False


OPTIMIZERS: Mapping[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        OptimizerSpec("adamw", 8),
        OptimizerSpec("adam", 8),
        OptimizerSpec("adamw-bf16", 4),
        OptimizerSpec("adamw-8bit", 2),
        OptimizerSpec("adamw-master", 8, master_bytes_per_param=4),
        OptimizerSpec("lion", 4),
        OptimizerSpec("momentum", 4),
        OptimizerSpec("sgd", 0),
        OptimizerSpec("adafactor", 4, factored=True),
    )
}
"""Known optimizers. `adamw` keeps two fp32 states; `-bf16` keeps them in bf16, `-8bit` in a byte each, `-master` adds
an fp32 copy of bf16 parameters; `momentum` is SGD with momentum."""


def optimizer(spec: str | OptimizerSpec) -> OptimizerSpec:
    """The optimizer called `spec`, or `spec` itself.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(spec, OptimizerSpec):
        return spec
    if spec.lower() not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {spec!r}; known are {', '.join(OPTIMIZERS)}, or give an OptimizerSpec")
    return OPTIMIZERS[spec.lower()]


@dataclass(frozen=True, slots=True)
class AtRest:
    """Bytes on one rank that live through the whole step."""

    parameters: int
    gradients: int
    optimizer: int
    master: int

    @property
    def states(self) -> int:
        """What the optimizer keeps."""
        return self.optimizer + self.master

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.states

    def by_kind(self) -> dict[str, int]:
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "master": self.master,
        }

    def __add__(self, other: AtRest) -> AtRest:
        return AtRest(
            self.parameters + other.parameters,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.master + other.master,
        )


def at_rest(
    local_shape: Sequence[int],
    spec: str | OptimizerSpec = "adamw",
    *,
    item_bytes: int = 4,
    gradient_item_bytes: int | None = None,
    trainable: bool = True,
) -> AtRest:
    """Bytes that one parameter keeps on one rank that holds `local_shape` of it.

    A frozen parameter has neither gradient nor optimizer state. Gradients have the parameter's dtype unless
    `gradient_item_bytes` says otherwise.
    """
    count = prod(local_shape)
    parameters = count * item_bytes
    if not trainable:
        return AtRest(parameters, 0, 0, 0)
    chosen = optimizer(spec)
    gradients = count * (item_bytes if gradient_item_bytes is None else gradient_item_bytes)
    if chosen.factored and len(local_shape) >= 2:
        rows, columns = prod(local_shape[:-1]), prod((*local_shape[:-2], local_shape[-1]))
        states = 4 * (rows + columns)
    else:
        states = round(count * chosen.state_bytes_per_param)
    return AtRest(parameters, gradients, states, round(count * chosen.master_bytes_per_param))


_BEFORE = 1 - 1e-9
"""Moments that are this near to each other are one: sums of the same seconds in another order."""


class Buffer(NamedTuple):
    """A tensor on one rank, or `copies` alike ones: alive from `birth` to the last use `death`, both included.

    Moments are whatever orders the step (op index, seconds). `death=None` is alive to the end. `bytes` is of each.
    """

    name: str
    bytes: int
    birth: float
    death: float | None
    kind: str
    copies: int = 1

    def taken(self, granularity_bytes: int = 1) -> int:
        """Bytes that the allocator takes for all of them."""
        return self.copies * rounded(self.bytes, granularity_bytes)


@dataclass(frozen=True)
class Peak:
    """The moment when most is alive."""

    bytes: int
    moment: float
    by_kind: Mapping[str, int]
    top: tuple[Buffer, ...]
    """The largest buffers alive then, largest first."""
    timeline: tuple[tuple[float, int], ...]
    """(moment, bytes alive) at every birth."""

    def describe(self) -> tuple[str, ...]:
        """The peak, its kinds and its largest tensors, one line each."""
        lines = [f"peak {gib(self.bytes)} at {self.moment:g}"]
        lines += [f"  {kind}: {gib(size)}" for kind, size in sorted(self.by_kind.items(), key=lambda item: -item[1])]
        lines += [f"  {buffer.name} ({buffer.kind}): {gib(buffer.taken())}" for buffer in self.top]
        return tuple(lines)


def gib(size_bytes: float) -> str:
    """`size_bytes` as people read it."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def rounded(size_bytes: int, granularity_bytes: int = ALLOCATION_BYTES) -> int:
    """What the allocator takes for `size_bytes`."""
    return -(-size_bytes // granularity_bytes) * granularity_bytes


def timeline(buffers: Iterable[Buffer], granularity_bytes: int = 1) -> list[tuple[float, int]]:
    """(moment, bytes alive) at every birth, in order; between two births memory only shrinks.

    Raises:
        ValueError: a buffer dies before it is born, or has negative bytes.
    """
    births: dict[float, int] = defaultdict(int)
    deaths: list[tuple[float, int]] = []
    for name, each, birth, death, _, copies in buffers:
        if each < 0 or (death is not None and death < birth):
            raise ValueError(f"buffer {name!r}: {each} bytes from {birth} to {death}")
        size = copies * rounded(each, granularity_bytes)
        births[birth] += size
        if death is not None:
            deaths.append((death, size))
    deaths.sort()
    alive, gone = 0, 0
    result: list[tuple[float, int]] = []
    for moment in sorted(births):
        while gone < len(deaths) and deaths[gone][0] < moment * _BEFORE:
            alive -= deaths[gone][1]
            gone += 1
        alive += births[moment]
        result.append((moment, alive))
    return result


def peak(buffers: Iterable[Buffer], *, top: int = 10, granularity_bytes: int = 1) -> Peak:
    """The largest sum of bytes alive at one moment, the first where several are equal."""
    found = list(buffers)
    alive_at = timeline(found, granularity_bytes)
    moment, most = max(alive_at, key=lambda entry: entry[1], default=(0.0, 0))
    alive = [
        buffer
        for buffer in found
        if buffer.birth <= moment and (buffer.death is None or buffer.death >= moment * _BEFORE)
    ]
    by_kind: dict[str, int] = defaultdict(int)
    for buffer in alive:
        by_kind[buffer.kind] += buffer.taken(granularity_bytes)
    largest = tuple(heapq.nlargest(top, alive, key=lambda buffer: buffer.copies * buffer.bytes))
    return Peak(most, moment, dict(by_kind), largest, tuple(alive_at))
