"""Styles of `parallelize_module` that say what a plan splits over one axis.

A product whose result stays split is joined to the product that reads it only where all between them was followed
through the rules and tried on a rank's shapes; elsewhere its result is gathered.
"""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopar import examples, planning
from autopar.api import skeleton
from passes.analysis.analysis import Analysis, analyse
from passes.capture.inputs import global_inputs
from passes.plan.parts import as_followed, followed
from passes.plan.plan import Placements, Plan
from passes.program.program import Program
from passes.rules.work import VIEWS
from passes.space.words import unfold_names

COLWISE, COLWISE_GATHERED = "ColwiseParallel()", "ColwiseParallel(output_layouts=Replicate())"
ROWWISE, ROWWISE_CUT = "RowwiseParallel()", "RowwiseParallel(input_layouts=Replicate())"
_NORMS = ("LayerNorm", "RMSNorm")
"""What the names of norms' classes end in; `SequenceParallel` is for these."""

Instances = Mapping[str, Sequence[str]]
"""The names of the modules that a pattern stands for."""
Shapes = dict[str, tuple[int, ...]]
"""Of the first argument that modules are given, by name."""


@dataclass(frozen=True)
class Ran:
    """A forward as it ran: its graph, what modules were given, whose results were written in place later, and whose
    parameters something else read."""

    analysis: Analysis
    shapes: Shapes
    written: frozenset[str]
    read_outside: frozenset[str]


def imported(styles: Iterable[str]) -> dict[str, list[str]]:
    """Names that these styles need from torch: `layouts` and `styles`."""
    names = {name for style in styles for name in re.findall(r"\b[A-Z]\w+(?=\()", style)}
    return {
        "layouts": sorted(names & {"Replicate"}),
        "styles": [*sorted(names - {"Replicate"}), "parallelize_module"],
    }


def styles_of(plan: Plan, model: nn.Module, call: examples.Call, axis: str, notes: list[str]) -> dict[str, str]:
    """Module pattern -> style; what no style says goes to `notes`.

    `call`: what one data-parallel rank feeds the model.
    """
    wanted, instances = _wanted(plan, model, axis, notes)
    if not wanted:
        return {}
    ran = _captured(call, skeleton(model))
    for pattern in list(wanted):
        if why := _why_not(ran, instances[pattern]):
            del wanted[pattern]
            notes.append(f"{pattern} is split over {axis}: {why}, so it stays whole there")
    styles = _joined(model, call, wanted, instances, dict(plan.axes)[axis], ran, notes)
    return _spelled(model, styles, instances)


def _why_not(ran: Ran, names: Sequence[str]) -> str:
    """Why modules that ran so cannot have a style; "" where they can."""
    if not ran.shapes.keys() >= set(names):
        return "it is read without being called"
    if not ran.read_outside.isdisjoint(names):
        return "it is called, and read besides"
    if not ran.written.isdisjoint(names):
        return "its result is written in place, which torch does not allow there"
    return ""


def _wanted(plan: Plan, model: nn.Module, axis: str, notes: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Module pattern -> the style that the plan's split of its weight asks for, and -> the modules it stands for."""
    index = [name for name, _ in plan.axes].index(axis)
    tied = {name for pair in plan.aliases.items() for name in pair}
    wanted: dict[str, str] = {}
    instances: dict[str, list[str]] = defaultdict(list)
    apart: set[str] = set()
    for placed in plan.parameters.values():
        name = unfold_names(placed.names)[0]
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        split = _placements(placed.in_compute)[index]
        if not split.startswith("S") or (leaf == "bias" and isinstance(module, nn.Linear)):
            continue
        pattern = pattern_of(placed).rpartition(".")[0]
        if name in tied:
            told = f"{pattern_of(placed)} is split over {axis}: tied weights would part, so it stays whole there"
            notes.append(told)
        elif leaf == "weight" and type(module).forward in (nn.Linear.forward, nn.Embedding.forward):
            columns = split.startswith("S(0") == isinstance(module, nn.Linear)  # S(0.1) too
            style = COLWISE_GATHERED if columns else ROWWISE_CUT
            if wanted.setdefault(pattern, style) != style:
                apart.add(pattern)
            instances[pattern] += [each.rpartition(".")[0] for each in unfold_names(placed.names)]
        else:
            kind = type(module).__name__
            notes.append(f"{pattern_of(placed)} is split over {axis} as {placed.in_compute}: no style splits a {kind}")
    for pattern in apart:
        del wanted[pattern]
        notes.append(
            f"{pattern} is split over {axis} by rows in some layers, by columns in others: it stays whole there"
        )
    return wanted, instances


def _spelled(model: nn.Module, styles: Mapping[str, str], instances: Instances) -> dict[str, str]:
    """Patterns that other modules match too, which lie otherwise, are replaced by the names of those they stand for."""
    found: dict[str, str] = {}
    names = [name for name, _ in model.named_modules()]
    for pattern, style in styles.items():
        matching = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
        alike = {name for name in names if matching.fullmatch(name)} == set(instances[pattern])
        found |= {pattern: style} if alike else dict.fromkeys(instances[pattern], style)
    return found


def _joined(
    model: nn.Module, call: examples.Call, wanted: Mapping[str, str], instances: dict[str, list[str]], ranks: int,
    ran: Ran, notes: list[str],
) -> dict[str, str]:  # fmt: skip
    """Keep results split between the products of one module where a rank's own part is enough."""
    styles = dict(wanted)
    parents: dict[str, list[str]] = defaultdict(list)
    for pattern in styles:
        parents[pattern.rpartition(".")[0]].append(pattern)
    for parent, children in parents.items():
        first = model.get_submodule(instances[children[0]][0].rpartition(".")[0])
        linears = [name for name, child in first.named_children() if isinstance(child, nn.Linear)]
        here = {child.rpartition(".")[2]: child for child in children}
        rows = [child for child in children if styles[child] == ROWWISE_CUT]
        columns = [child for child in children if styles[child] == COLWISE_GATHERED]
        if len(rows) != 1 or not columns or set(linears) != set(here):
            continue
        trial: dict[str, str] = dict.fromkeys(columns, COLWISE) | dict.fromkeys(rows, ROWWISE)
        try:
            styles |= _kept_split(model, call, parent, trial, instances, ranks, ran)
        except _CannotJoinError as why:
            notes.append(f"{parent or 'the model'}: {why}, so the script gathers what its products give")
    gathered = [pattern for pattern, style in styles.items() if style == COLWISE_GATHERED]
    notes += [f"{pattern}: what it gives stays split in the plan; the script gathers it" for pattern in gathered]
    return styles


class _CannotJoinError(Exception):
    """Says why a rank's own part is not enough."""


def _kept_split(
    model: nn.Module, call: examples.Call, parent: str, trial: Mapping[str, str], instances: dict[str, list[str]],
    ranks: int, ran: Ran,
) -> dict[str, str]:  # fmt: skip
    """`trial`, the styles of products in `parent`, and a style for every norm between them.

    Raises:
        _CannotJoinError: what lies between them needs more than a rank's own part.
    """
    names = {
        style: [each for pattern in trial if trial[pattern] == style for each in instances[pattern]]
        for style in (COLWISE, ROWWISE)
    }
    rows = {f"{each}.{leaf}" for each in names[COLWISE] for leaf, _ in model.get_submodule(each).named_parameters()}
    found = followed(ran.analysis, rows, {f"{each}.weight" for each in names[ROWWISE]}, ranks)
    if found.problem:
        raise _CannotJoinError(found.problem)
    part = copy.deepcopy(skeleton(model))
    for style, modules in names.items():
        for name in modules:
            whole = part.get_submodule(name)
            assert isinstance(whole, nn.Linear)
            rows_in = whole.in_features if style == COLWISE else whole.in_features // ranks
            rows_out = whole.out_features // ranks if style == COLWISE else whole.out_features
            bias = whole.bias is not None
            part.set_submodule(name, nn.Linear(rows_in, rows_out, bias, device="meta", dtype=whole.weight.dtype))
    try:
        own = _captured(call, part)
    except Exception:  # whatever the model's own code raises
        raise _CannotJoinError("does not run on a rank's own part") from None
    if not as_followed(ran.analysis, found, own.analysis.program.graph.graph, ranks):
        raise _CannotJoinError("takes a rank's own part for something else")
    parents = [name.rpartition(".")[0] for name in instances[next(iter(trial))]]
    norms = _norms(model, parents, found.shared, ran.shapes, own.shapes)
    for inside in norms:
        instances[f"{parent}.{inside}"] = [f"{each}.{inside}" for each in parents]
    return {**trial, **{f"{parent}.{inside}": style for inside, style in norms.items()}}


def _norms(
    model: nn.Module, parents: Sequence[str], shared: Iterable[str], whole: Shapes, part: Shapes
) -> dict[str, str]:
    """Styles for the modules, inside of `parents`, of parameters whose gradients are sums over ranks."""
    found = {}
    for name in sorted({parameter.rpartition(".")[0] for parameter in shared}):
        module = model.get_submodule(name)
        split = [d for d, (a, b) in enumerate(zip(whole.get(name, ()), part.get(name, ()), strict=False)) if a != b]
        inside = next((name.removeprefix(f"{each}.") for each in parents if name.startswith(f"{each}.")), "")
        if not type(module).__name__.endswith(_NORMS) or len(split) != 1 or not inside:
            raise _CannotJoinError(f"{name or 'the model'} would get a gradient of a rank's own part alone")
        found[inside] = f"SequenceParallel(sequence_dim={split[0]}, use_local_output=True)"
    return found


def _captured(call: examples.Call, model: nn.Module) -> Ran:
    """A forward, captured."""
    given = global_inputs(*call, 1, None)
    shapes: Shapes = {}
    results: dict[str, tuple[torch.Tensor, int]] = {}

    def before(name: str, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            shapes[name] = tuple(inputs[0].shape)

    def after(name: str, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            results[name] = result, result._version

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _, inputs, name=name: before(name, inputs)))
        hooks.append(module.register_forward_hook(lambda _, inputs, result, name=name: after(name, result)))
    try:
        program = planning.captured(
            model, given.args, given.kwargs, batch_dims=given.batch_dims, batch_size=given.batch_size, backward=False
        )
    finally:
        for hook in hooks:
            hook.remove()
    written = frozenset(name for name, (result, version) in results.items() if result._version != version)
    return Ran(analyse(program), shapes, written, _read_outside(program))


def _read_outside(program: Program) -> frozenset[str]:
    """Modules whose parameters are read by what is not their own forward."""
    found = set()
    for node, given in program.placeholders.items():
        owner = given.name.rpartition(".")[0]
        views = [node]
        for view in views:
            for user in view.users:
                if user.target in VIEWS:
                    views.append(user)
                if given.kind == "parameter" and user.op == "call_function" and user.meta["module"] != owner:
                    found.add(owner)
    return frozenset(found)


# -- names -------------------------------------------------------------------------------------------------------------


def pattern_of(placed: Placements) -> str:
    """`model.layers.*.mlp.up_proj.weight`."""
    first = unfold_names(placed.names)
    if len(first) == 1:
        return first[0]
    parts = list(zip(*(name.split(".") for name in first), strict=True))
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)


def container_of(model: nn.Module, pattern: str) -> str:
    """`model.layers`, whose children are layers and have `mlp.up_proj.weight`; "" where there is none.

    Of nested containers (`stages.*.*.up`), the outermost whose children can be called: `stages.*`.
    """
    parts = pattern.split(".*")
    for level in range(1, len(parts)):
        container = ".*".join(parts[:level])
        if all(type(layer).forward is not nn.Module.forward for layer in _layers(model, container)):
            return container
    return ""


def quoted(text: str) -> str:
    """A name as the script writes it."""
    return json.dumps(text, ensure_ascii=False)


def loop_code(container: str) -> str:
    """What a script loops over to get each layer of a container."""
    first, *more = container.split(".*")
    code = f"model.get_submodule({quoted(first)}).children()"
    for part in more:
        inner = f"part.get_submodule({quoted(part[1:])})" if part else "part"
        code = f"[layer for part in {code} for layer in {inner}.children()]"
    return code


def _layers(model: nn.Module, container: str) -> list[nn.Module]:
    first, *more = container.split(".*")
    found = list(model.get_submodule(first).children())
    for part in more:
        found = [layer for each in found for layer in each.get_submodule(part.removeprefix(".")).children()]
    return found


def _placements(layout: str) -> list[str]:
    """`RS(0)` as ["R", "S(0)"]."""
    found: list[str] = []
    for letter in layout:
        if letter in "RSP":
            found.append(letter)
        else:
            found[-1] += letter
    return found
