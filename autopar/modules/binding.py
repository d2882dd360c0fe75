"""How an executable is called: which placeholder takes what, and what becomes of each result. Worked out once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from autopar.modules import stored
from autopar.modules.runtime import Executable, Runtime, has_gradients
from passes.program.local import LocalInput, LocalOutput, LocalProgram, Storage
from passes.program.program import Program
from passes.program.walks import results_of


@dataclass(frozen=True)
class Binding:
    """What is the same in each call of an executable: where its values come from and how its results go back."""

    parameters: tuple[tuple[int, int], ...]
    """Placeholder and number of each parameter, as `Runtime.specs` has them."""
    padded: tuple[tuple[int, Storage], ...]
    """Placeholders of parameters whose parts are stored without what fills them up."""
    others: tuple[tuple[int, LocalInput], ...]
    """The other placeholders but tangents."""
    placeholders: int
    changed: frozenset[str]
    """Buffers and parameters that the step writes to."""
    written: tuple[int, ...]
    """Placeholders of these parameters."""
    results: tuple[LocalOutput, ...]
    """Outputs and new buffers."""
    returned: tuple[tuple[Any, tuple[int, ...]] | None, ...]
    """Per output: the spec of the DTensor it becomes and the shape of its part, None for a plain tensor."""
    kept: tuple[bool, ...]
    """Per output and new buffer: whether it is in memory that the backward reads."""
    constant: tuple[bool, ...]
    """Per output: whether it has no gradient."""
    gradients: tuple[str, ...]
    outputs: tuple[str, ...]
    """Names of the outputs; of those that are one scalar, the one that has the tangent."""
    tangents: frozenset[str]
    parted: frozenset[str]
    """Inputs that the batch splits."""


def binding_of(runtime: Runtime, executable: Executable) -> Binding:
    """The executable's binding, made at its first call."""
    known = runtime.bindings.get(id(executable))
    if known is None:
        made = _bind(runtime, executable.local, executable.lowered.halves.kept)
        known = runtime.bindings[id(executable)] = executable, made
    found: Binding = known[1]
    return found


def _bind(runtime: Runtime, local: LocalProgram, kept: tuple[bool, ...]) -> Binding:
    sizes = runtime.axis_sizes
    number = {name: index for index, name in enumerate(runtime.specs)}
    changed = frozenset(output.name for output in local.outputs if output.kind == "buffer")
    places = [(place, entry) for place, entry in enumerate(e for e in local.inputs if e.kind != "tangent")]
    parameters = [(place, entry) for place, entry in places if entry.kind == "parameter"]
    results = tuple(output for output in local.outputs if output.kind != "gradient")
    declared = [output for output in local.program.outputs if output.kind == "output"]
    asked = frozenset(entry.name for entry in local.inputs if entry.kind == "tangent")
    of_one = _one_name(local.program, asked)
    names = [output.name for output in results if output.kind == "output"]
    return Binding(
        parameters=tuple((place, number[entry.name]) for place, entry in parameters),
        padded=tuple(
            (place, entry.storage)
            for place, entry in parameters
            if stored.part_shape(entry.storage, sizes, runtime.coordinate) != entry.storage.padded_shape(sizes)
        ),
        others=tuple((place, entry) for place, entry in places if entry.kind != "parameter"),
        placeholders=len(places),
        changed=changed,
        written=tuple(place for place, entry in parameters if entry.name in changed),
        results=results,
        returned=_returned(runtime, local),
        kept=kept,
        constant=tuple(not output.requires_grad for output in declared),
        gradients=tuple(output.name for output in local.outputs if output.kind == "gradient"),
        outputs=tuple(of_one.get(name, name) for name in names),
        tangents=asked,
        parted=frozenset(i.name for i in local.program.inputs if i.kind == "input" and i.batch_dim is not None),
    )


def _returned(runtime: Runtime, local: LocalProgram) -> tuple[tuple[Any, tuple[int, ...]] | None, ...]:
    """How each output goes back: beside a loss, what is no scalar is a DTensor; else all is plain."""
    program, sizes = local.program, runtime.axis_sizes
    nodes = results_of(local.graph.graph)
    outputs = [
        (output, node.meta["val"].dtype)
        for output, node in zip(local.outputs, nodes, strict=True)
        if output.kind == "output"
    ]
    scalar = any(not output.storage.shape and dtype.is_floating_point for output, dtype in outputs)
    if not (program.has_loss or (scalar and not has_gradients(local))):
        return (None,) * len(outputs)

    def returned(output: LocalOutput, dtype: torch.dtype) -> tuple[Any, tuple[int, ...]]:
        layout = stored.placements(output.storage, sizes, output.name)
        mine = stored.part_shape(output.storage, sizes, runtime.coordinate)
        return stored.spec(runtime.mesh, layout, output.storage.shape, dtype), mine

    return tuple(returned(output, dtype) if output.storage.shape else None for output, dtype in outputs)


def _one_name(program: Program, asked: Collection[str]) -> dict[str, str]:
    """Other names under which a model returns a scalar -> the one that has its tangent."""
    nodes = results_of(program.graph.graph)
    scalars = [
        (output.name, node)
        for output, node in zip(program.outputs, nodes, strict=True)
        if output.kind == "output" and not node.meta["val"].dim()
    ]
    first = {node: name for name, node in scalars if name in asked}
    return {name: first[node] for name, node in scalars if node in first and name not in asked}
