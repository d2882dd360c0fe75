"""A plan as a plain script, `parallelize_module` and `fully_shard`, and what of it cannot be said that way.

The script must compute what the model computes; it may move more than the plan does (see `styles`). What the plan
splits beyond weights of `nn.Linear` and `nn.Embedding` is listed.
"""

from __future__ import annotations

import json
import math
import pprint
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn

from autopar import examples, planning
from autopar.mixed import policy_code, precision_of
from autopar.options import Options
from autopar.plans.styles import container_of, imported, loop_code, pattern_of, quoted, styles_of
from costmodel.memory import gib
from passes.capture.capture import extra_arguments
from passes.plan.plan import Plan
from passes.plan.report_text import RECOMPUTED, seconds_text
from passes.program.precision import dtype_text

_NOT_DIMENSIONS = ("transformers_version", "architectures", "dtype", "model_type")


@dataclass(frozen=True)
class Ejected:
    """The script's text, and what it leaves out of the plan."""

    script: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Layers:
    """What is done to every child of `container`: module in the layer -> style."""

    container: str
    loop: str
    items: tuple[tuple[str, str], ...]


def eject(plan: Plan, model: nn.Module, call: examples.Call, argument: str, file: str) -> Ejected:
    """The script for `plan`, which was made for `model` (named `argument` on the command line), to be kept in `file`.

    `call`: what one data-parallel rank feeds the model.

    Raises:
        ValueError: a model that the script could not build again.
    """
    notes: list[str] = []
    axis = _tensor_axis(plan, notes)
    styles = styles_of(plan, model, call, axis, notes) if axis is not None else {}
    repeated = [pattern for placed in plan.parameters.values() if "*" in (pattern := pattern_of(placed))]
    containers = sorted({container_of(model, pattern) for pattern in repeated} - {""})
    layers, outside = _by_container(model, styles)
    state_axes = _state_axes(plan, axis if styles else None, notes)
    options = planning.options_of(plan)
    policy = options.mp_policy if precision_of(options.mp_policy) is not None else None
    notes += _left_out(plan, axis)
    notes += _left_out_of_the_step(plan, options, layers=bool(containers), shards_state=bool(state_axes))
    notes += _of_other_samples(plan)
    notes += _of_the_model(plan, model, shards_state=bool(state_axes))
    mesh = " x ".join(f"{name}={size}" for name, size in plan.axes)
    script = _template().render(
        title=_in_docstring(f"{argument} on {mesh}, planned as {plan.strategy}."),
        step=seconds_text(plan.step_time_s),
        memory=gib(plan.peak_memory_bytes),
        hardware=plan.hardware,
        ranks=math.prod(size for _, size in plan.axes),
        file=_in_docstring(file),
        notes=[f"- {_in_docstring(note)}" for note in notes],
        model=_recipe(model, argument),
        mesh=json.dumps(plan.mesh),
        batch_axes=json.dumps(list(plan.batch_axes)),
        state_axes=repr(state_axes),
        shards_state=bool(state_axes),
        policy=policy_code(policy) if policy is not None and state_axes else "",
        micro_batches=plan.accumulate,
        checkpoints=plan.recompute == "full" and bool(containers),
        kept="" if plan.reshard else ", reshard_after_forward=False",
        tensor_axis=axis,
        layers=layers,
        outside=outside,
        imported=imported(styles.values()),
        loops=[loop_code(container) for container in containers],
        more="".join(f", {name}={value!r}" for name, value in extra_arguments(model, *call)[0].items()),
        batch_code=_batch_code(plan, model, call),
        casts=any(_is_cast(model, leaf) for leaf in pytree.tree_leaves(call)),
        dtype=dtype_text(next(iter(model.parameters())).dtype),
    )
    return Ejected(script, tuple(notes))


def _by_container(
    model: nn.Module, styles: Mapping[str, str]
) -> tuple[list[tuple[str, Layers]], list[tuple[str, str]]]:
    """The styles of layers, by the list that holds them, each under the name of a constant; and all other styles."""
    inside: dict[str, list[tuple[str, str]]] = defaultdict(list)
    outside = []
    for pattern, style in styles.items():
        container = container_of(model, pattern)
        if container:
            inside[container].append((pattern.removeprefix(f"{container}.*."), style))
        else:
            outside.append((pattern, style))
    layers = [
        (f"LAYER{index or ''}", Layers(name, loop_code(name), tuple(items)))
        for index, (name, items) in enumerate(inside.items())
    ]
    return layers, outside


def _in_docstring(text: str) -> str:
    return text.replace("\\", r"\\").replace('"""', r"\"\"\"")


def _template() -> Any:
    env = Environment(
        loader=PackageLoader("autopar.plans", "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    env.filters["quoted"] = quoted
    return env.get_template("eject.py.j2")


# -- what the script does ----------------------------------------------------------------------------------------------


def _tensor_axis(plan: Plan, notes: list[str]) -> str | None:
    """The axis that splits weights for compute; the one that splits most, where several do."""
    shares = {name: plan.roles[name].split for name, _ in plan.axes if name not in plan.batch_axes}
    used = sorted((name for name, share in shares.items() if share > 0), key=lambda name: -shares[name])
    notes += [f"{name} splits weights too; parallelize_module takes one axis" for name in used[1:]]
    return used[0] if used else None


def _state_axes(plan: Plan, tensor: str | None, notes: list[str]) -> tuple[str, ...]:
    """Axes that fully_shard works over: those that split most parameters at rest alone, and those of the batch.

    `tensor`: the axis that parallelize_module works over; both cannot be one.
    """
    held = [name for name, _ in plan.axes if plan.roles[name].stored > 0.5]
    whole = [name for name in plan.batch_axes if name not in held]
    notes += [
        f"parameters whole on {name} between steps: the script shards them, which takes less memory" for name in whole
    ]
    if tensor in held:
        notes.append(f"parameters gathered over {tensor} before use: the script keeps them whole on its ranks")
    return tuple(name for name, _ in plan.axes if name != tensor and (name in held or name in plan.batch_axes))


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


def _left_out_of_the_step(plan: Plan, options: Options, *, layers: bool, shards_state: bool) -> list[str]:
    """What of precision, memory and the optimizer it leaves out; `layers`: whether the model repeats any."""
    notes = []
    if precision_of(options.mp_policy) is not None and not shards_state:
        notes.append(
            "mixed precision is fully_shard's, and no axis shards state: the script computes in the parameters' dtype"
        )
    if plan.recompute == "full" and layers:
        if len(plan.batch_axes) < len(plan.axes):
            notes.append(
                "what collectives of forward bring is kept in the plan; the script's checkpoints run them again"
            )
    elif plan.recompute != "none":
        again = RECOMPUTED[plan.recompute]
        notes.append(f"backward computes {again} again in the plan, nothing in the script")
    if plan.regather:
        notes.append("activations gathered again for backward in the plan: the script keeps them")
    if options.async_tp:
        notes.append("async_tp is a pass of torch.compile's; the script runs uncompiled")
    if options.optimizer not in ("adam", "adamw"):
        notes.append(
            f"memory is the plan's with the optimizer {options.optimizer!r}; the script uses torch.optim.AdamW"
        )
    return notes


def _of_other_samples(plan: Plan) -> list[str]:
    """Where samples of several data-parallel ranks meet in the model, which they do not in the script."""
    met = {
        f"{each.reason} ({each.source}): the script's ranks have their own samples there, which is another loss"
        for each in plan.collectives
        if (each.phase, each.role, each.kind) == ("forward", "activation", "all_gather")
        and not set(plan.batch_axes).isdisjoint(each.axes)
    }
    return sorted(met)


# -- the model and its inputs ------------------------------------------------------------------------------------------


def _of_the_model(plan: Plan, model: nn.Module, *, shards_state: bool) -> list[str]:
    """What the script does otherwise because of the model's size and dtypes."""
    notes = []
    whole_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
    if whole_bytes > (plan.memory_budget_bytes or math.inf):
        notes.append(f"every rank of the script builds the whole model first, {gib(whole_bytes)} on its device")
    trained = {dtype_text(p.dtype) for p in model.parameters() if p.requires_grad}
    if shards_state and len(trained) > 1:
        notes.append(
            f"trained parameters are {' and '.join(sorted(trained))}; fully_shard takes one: --dtype casts all"
        )
    return notes


def _recipe(model: nn.Module, argument: str) -> dict[str, Any]:
    """How the script builds the model."""
    path, colon, function = argument.rpartition(":")
    if colon and path.endswith(".py"):
        return {"file": str(Path(path).resolve()), "function": function}
    config = getattr(model, "config", None)
    if config is None or not type(model).__module__.startswith("transformers."):
        raise ValueError(f"{argument}: the script can build transformers' models and file.py:function, not this one")
    kept = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_DIMENSIONS}
    text = pprint.pformat(kept, width=100, sort_dicts=False)
    return {"file": None, "name": type(model).__name__, "config_name": type(config).__name__, "config": text}


def _batch_code(plan: Plan, model: nn.Module, call: examples.Call) -> str:
    """The body of the script's `batch`: whole numbers are below the most of those in `call`, as labels are few; zero
    where it has none."""
    examples.restored(plan.example)  # refuses what no script could write
    args, kwargs = call
    most = getattr(getattr(model, "config", None), "vocab_size", None) or _fewest_rows(model)
    ids, labels = (kwargs.get(name) for name in ("input_ids", "labels"))
    same = isinstance(ids, torch.Tensor) and isinstance(labels, torch.Tensor) and _may_be(labels, ids)
    if args:
        return f"return {_value_code('', args, model, most)}"
    items = [
        f"    {quoted(name)}: {_value_code(name, value, model, most)},\n"
        for name, value in kwargs.items()
        if not (same and name == "labels")
    ]
    made = "{\n" + "".join(items) + "}"
    return f'inputs = {made}\ninputs["labels"] = inputs["input_ids"]\nreturn inputs' if same else f"return {made}"


def _value_code(name: str, value: Any, model: nn.Module, most: int) -> str:
    """A random value like that of the input `name`, as code; token ids are below `most`."""
    if isinstance(value, dict):
        pairs = [f"{key!r}: {_value_code(f'{name}.{key}', item, model, most)}" for key, item in value.items()]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, tuple | list):
        items = [_value_code(f"{name}.{index}", item, model, most) for index, item in enumerate(value)]
        return f"[{', '.join(items)}]" if isinstance(value, list) else f"({''.join(f'{item}, ' for item in items)})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if not isinstance(value, torch.Tensor):
        return repr(value)
    shape = tuple(value.shape)
    dtype = "" if value.dtype in (torch.float32, torch.int64) else f", {value.dtype}"
    if _is_cast(model, value):
        dtype = f", dtype or {value.dtype}"
    if value.dtype.is_floating_point or value.dtype.is_complex:
        drawn = ", dtype=torch.complex64" if value.dtype.is_complex else ""
        return f"torch.randn({shape}, generator=source{drawn}).to(device{dtype})"
    if "mask" in name or value.dtype == torch.bool:
        return f"torch.ones({shape}, dtype={value.dtype}, device=device)"
    below = most if name == "input_ids" else 1 if value.is_meta or not value.numel() else max(1, int(value.max()) + 1)
    return f"torch.randint(0, {below}, {shape}, generator=source).to(device{dtype})"


def _is_cast(model: nn.Module, value: Any) -> bool:
    """Whether an input comes in the dtype that the script is told to cast the model to: it has one of parameters."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype in _dtypes(model)


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def _may_be(labels: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether the labels are the token ids, as far as is known."""
    return labels.shape == ids.shape and (labels.is_meta or ids.is_meta or torch.equal(labels, ids))


def _fewest_rows(model: nn.Module) -> int:
    """Rows of the smallest embedding: every id below it is a row of all."""
    rows: Sequence[int] = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return min(rows, default=2)
