"""A plan as a plain script, `parallelize_module` and `fully_shard`, and what of it cannot be said that way.

The script must compute what the model computes; it may move more than the plan does. So a product whose result stays
split is joined to the product that reads it only where the module between them was tried on local shapes; elsewhere
its result is gathered. What the plan splits beyond weights of `nn.Linear` and `nn.Embedding` is listed.
"""

from __future__ import annotations

import copy
import json
import math
import pprint
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn

from autopar import examples, planning
from autopar.api import skeleton
from costmodel.memory import gib
from passes.inputs import global_inputs
from passes.plan import Placements, Plan
from passes.report_text import seconds_text
from passes.words import unfold_names

COLWISE, COLWISE_GATHERED = "ColwiseParallel()", "ColwiseParallel(output_layouts=Replicate())"
ROWWISE, ROWWISE_CUT = "RowwiseParallel()", "RowwiseParallel(input_layouts=Replicate())"
_NOT_DIMENSIONS = ("transformers_version", "architectures", "dtype", "model_type")
_COLUMNS = (COLWISE, COLWISE_GATHERED)


@dataclass(frozen=True)
class Ejected:
    """The script's text, and what it leaves out of the plan."""

    script: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Layers:
    """What is done to every child of `container`: module in the layer -> style."""

    container: str
    items: tuple[tuple[str, str], ...]


def eject(plan: Plan, model: nn.Module, argument: str, file: str) -> Ejected:
    """The script for `plan`, which was made for `model` (named `argument` on the command line), to be kept in `file`.

    Raises:
        ValueError: a model that the script could not build again.
    """
    notes: list[str] = []
    axis = _tensor_axis(plan, notes)
    styles = _styles(plan, model, axis, notes) if axis is not None else {}
    containers = sorted({_container(name) for p in plan.parameters.values() if "*" in (name := _pattern(p))})
    inside: dict[str, list[tuple[str, str]]] = defaultdict(list)
    outside = []
    for pattern, style in styles.items():
        container, star, module = pattern.partition(".*.")
        if star:
            inside[container].append((module, style))
        else:
            outside.append((pattern, style))
    layers = [(f"LAYER{index or ''}", Layers(name, tuple(items))) for index, (name, items) in enumerate(inside.items())]
    state_axes = _state_axes(plan, notes)
    notes += _left_out(plan, axis)
    script = _template().render(
        title=f"{argument} on {' x '.join(f'{name}={size}' for name, size in plan.axes)}, planned as {plan.strategy}.",
        step=seconds_text(plan.step_time_s),
        memory=gib(plan.peak_memory_bytes),
        hardware=plan.hardware,
        ranks=math.prod(size for _, size in plan.axes),
        file=file,
        notes=[f"- {note}" for note in notes],
        model=_recipe(model, argument),
        mesh=json.dumps(plan.mesh),
        batch_axes=json.dumps(list(plan.batch_axes)),
        state_axes=repr(state_axes),
        shards_state=bool(state_axes),
        kept="" if plan.reshard else ", reshard_after_forward=False",
        tensor_axis=axis,
        layers=layers,
        outside=outside,
        containers=containers,
        batch_code=_batch_code(plan, model, argument),
        dtype=str(next(iter(model.parameters())).dtype).removeprefix("torch."),
    )
    return Ejected(script, tuple(notes))


def _template() -> Any:
    env = Environment(
        loader=PackageLoader("autopar", "templates"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    return env.get_template("eject.py.j2")


# -- what the script does ----------------------------------------------------------------------------------------------


def _tensor_axis(plan: Plan, notes: list[str]) -> str | None:
    """The axis that splits weights for compute; the one that splits most, where several do."""
    shares = {name: plan.roles[name].split for name, _ in plan.axes if name not in plan.batch_axes}
    used = sorted((name for name, share in shares.items() if share > 0), key=lambda name: -shares[name])
    notes += [f"{name} splits weights too; parallelize_module takes one axis" for name in used[1:]]
    return used[0] if used else None


def _state_axes(plan: Plan, notes: list[str]) -> tuple[str, ...]:
    """Axes that fully_shard works over: those that split most parameters at rest alone, and those of the batch."""
    held = tuple(name for name, _ in plan.axes if plan.roles[name].stored > 0.5)
    whole = [name for name in plan.batch_axes if name not in held]
    notes += [
        f"parameters whole on {name} between steps: the script shards them, which takes less memory" for name in whole
    ]
    wanted = {*held, *plan.batch_axes}
    return tuple(name for name, _ in plan.axes if name in wanted)


def _styles(plan: Plan, model: nn.Module, axis: str, notes: list[str]) -> dict[str, str]:
    """Module pattern -> style."""
    index = [name for name, _ in plan.axes].index(axis)
    tied = {name for pair in plan.aliases.items() for name in pair}
    wanted: dict[str, str] = {}
    for placed in plan.parameters.values():
        name = unfold_names(placed.names)[0]
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        split = _placements(placed.in_compute)[index]
        if not split.startswith("S") or (leaf == "bias" and isinstance(module, nn.Linear)):
            continue
        pattern = _pattern(placed).rpartition(".")[0]
        if name in tied:
            notes.append(f"{_pattern(placed)} is split over {axis}: tied weights would part, so it stays whole there")
        elif isinstance(module, nn.Linear) and leaf == "weight":
            wanted[pattern] = COLWISE_GATHERED if split == "S(0)" else ROWWISE_CUT
        elif isinstance(module, nn.Embedding) and leaf == "weight":
            wanted[pattern] = ROWWISE_CUT if split == "S(0)" else COLWISE_GATHERED
        else:
            kind = type(module).__name__
            notes.append(f"{_pattern(placed)} is split over {axis} as {placed.in_compute}: no style splits a {kind}")
    return _joined(plan, model, wanted, dict(plan.axes)[axis], notes)


def _joined(plan: Plan, model: nn.Module, wanted: Mapping[str, str], ranks: int, notes: list[str]) -> dict[str, str]:
    """Keep results split between the products of one module where it runs on local shapes."""
    styles = dict(wanted)
    parents: dict[str, list[str]] = defaultdict(list)
    for pattern in styles:
        parents[pattern.rpartition(".")[0]].append(pattern)
    for parent, children in parents.items():
        instance = model.get_submodule(_instance(model, parent)) if parent else model
        linears = [name for name, child in instance.named_children() if isinstance(child, nn.Linear)]
        here = {child.rpartition(".")[2]: child for child in children}
        rows = [child for child in children if styles[child] == ROWWISE_CUT]
        columns = [child for child in children if styles[child] == COLWISE_GATHERED]
        if len(rows) != 1 or not columns or set(linears) != set(here):
            continue
        trial = {child: COLWISE if child in columns else ROWWISE for child in children}
        if _runs_on_a_part(plan, model, trial, ranks):
            styles |= trial
        else:
            notes.append(f"{parent}: does not run on a rank's own part, so the script gathers what its products give")
    gathered = [pattern for pattern, style in styles.items() if style == COLWISE_GATHERED]
    notes += [f"{pattern}: what it gives stays split in the plan; the script gathers it" for pattern in gathered]
    return styles


def _runs_on_a_part(plan: Plan, model: nn.Module, styles: Mapping[str, str], ranks: int) -> bool:
    """Whether the model can be captured where these products have a rank's share of rows or columns."""
    part = copy.deepcopy(skeleton(model))
    for pattern, style in styles.items():
        for name in _instances(part, pattern):
            whole = part.get_submodule(name)
            assert isinstance(whole, nn.Linear)
            columns = style in _COLUMNS
            rows_in = whole.in_features if columns else whole.in_features // ranks
            rows_out = whole.out_features // ranks if columns else whole.out_features
            bias = whole.bias is not None
            part.set_submodule(name, nn.Linear(rows_in, rows_out, bias, device="meta", dtype=whole.weight.dtype))
    args, kwargs = examples.restored(plan.example)
    given = global_inputs(args, kwargs, 1, None)
    try:
        planning.captured(
            part, given.args, given.kwargs, batch_dims=given.batch_dims, batch_size=given.batch_size, backward=False
        )
    except Exception:  # whatever the model's own code raises
        return False
    return True


def _left_out(plan: Plan, axis: str | None) -> list[str]:
    """What of activations the script lays out otherwise."""
    notes = []
    for name, _ in plan.axes:
        role = plan.roles[name]
        spread = [
            word
            for word in (*role.products, *role.others)
            if word in ("sequence", "experts") and name not in plan.batch_axes
        ]
        if spread:
            words = " and ".join(dict.fromkeys(spread))
            where = "between its products" if name == axis else "so its ranks repeat each other's compute"
            notes.append(f"{name} splits {words} in the plan; the script keeps that whole, {where}")
    return notes


# -- names -------------------------------------------------------------------------------------------------------------


def _pattern(placed: Placements) -> str:
    """`model.layers.*.mlp.up_proj.weight`."""
    first = unfold_names(placed.names)
    if len(first) == 1:
        return first[0]
    parts = list(zip(*(name.split(".") for name in first), strict=True))
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)


def _container(pattern: str) -> str:
    return pattern.partition(".*")[0]


def _instances(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules that a pattern stands for."""
    container, star, module = pattern.partition(".*.")
    if not star:
        return [pattern]
    return [f"{container}.{name}.{module}" for name, _ in model.get_submodule(container).named_children()]


def _instance(model: nn.Module, pattern: str) -> str:
    return _instances(model, pattern)[0] if ".*." in pattern else pattern.replace(".*", ".0")


def _placements(layout: str) -> list[str]:
    """`RS(0)` as ["R", "S(0)"]."""
    found: list[str] = []
    for letter in layout:
        if letter in "RSP":
            found.append(letter)
        else:
            found[-1] += letter
    return found


# -- the model and its inputs ------------------------------------------------------------------------------------------


def _recipe(model: nn.Module, argument: str) -> dict[str, Any]:
    """How the script builds the model."""
    path, colon, function = argument.rpartition(":")
    if colon and path.endswith(".py"):
        return {"file": str(Path(path).resolve()), "function": function}
    config = getattr(model, "config", None)
    if config is None or not type(model).__module__.startswith("transformers."):
        raise ValueError(f"{argument}: the script can build transformers' models and file.py:function, not this one")
    kept = {
        k: v
        for k, v in config.to_diff_dict().items()
        if k not in ("transformers_version", "architectures", "dtype", "model_type")
    }
    text = pprint.pformat(kept, width=100, sort_dicts=False)
    return {"file": None, "name": type(model).__name__, "config_name": type(config).__name__, "config": text}


def _batch_code(plan: Plan, model: nn.Module, argument: str) -> str:
    """The body of the script's `batch`."""
    args, kwargs = examples.restored(plan.example)
    most = getattr(getattr(model, "config", None), "vocab_size", None) or _fewest_rows(model)
    tensors: dict[str, torch.Tensor] = {}
    lines = []

    def text_of(name: str, value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return repr(value)
        shape = tuple(value.shape)
        tensors[name] = value
        if name == "labels" and "input_ids" in tensors and tensors["input_ids"].shape == value.shape:
            return "input_ids"
        if value.dtype.is_floating_point:
            made = f"torch.randn({shape}, generator=source).to(device)"
        elif "mask" in name or value.dtype == torch.bool:
            made = f"torch.ones({shape}, dtype={value.dtype}, device=device)"
        else:
            made = f"torch.randint(0, {most}, {shape}, generator=source).to(device)"
        lines.append(f"{name} = {made}")
        return name

    named = sorted(kwargs.items(), key=lambda item: item[0] != "input_ids")
    positional = [text_of(f"input_{index}", value) for index, value in enumerate(args)]
    keywords = {name: text_of(name, value) for name, value in named}
    given = ", ".join(f'"{name}": {text}' for name, text in keywords.items())
    lines.append(f"return ({', '.join(positional)},)" if positional else f"return {{{given}}}")
    return "\n".join(lines)


def _fewest_rows(model: nn.Module) -> int:
    """Rows of the smallest embedding: every id below it is a row of all."""
    rows: Sequence[int] = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return min(rows, default=2)
