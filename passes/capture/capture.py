"""`capture`: an unmodified module and example inputs in, its whole training step as one `Program` out.

    placeholders -> model(...) -> outputs -> autograd.grad -> graph -> normalize

The model's parameters and buffers are swapped for tracing tensors while its forward runs, and put back afterwards with
every other attribute of its modules.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from passes.capture.autocast import autocast_as, autocast_dtype
from passes.capture.collector import settled
from passes.capture.differentiated import (
    Result,
    Tangent,
    Tangents,
    flatten_outputs,
    gradients,
    refuse_own_backward,
    tangents_of,
)
from passes.capture.guards import guards_of
from passes.capture.inputs import flatten_inputs, refuse_hidden_tensors
from passes.capture.left_behind import left_behind, left_note
from passes.capture.normalize import normalize
from passes.capture.picked_rows import PickedRowsError, picked_as_all
from passes.capture.rebind import rebind
from passes.capture.settings import attributes, settings_read
from passes.capture.side_effects import attribute_notes, empty_buffers, mutated_notes, unchanged
from passes.capture.slots import Slot, slots_of, user_slot
from passes.capture.surroundings import tracing
from passes.capture.tracing import (
    NO_OTHER_RANKS,
    WRITES_OUTSIDE,
    Branches,
    ReadsInputsError,
    TooLargeToReadError,
    Tracer,
    fake_mode,
    unwrapped,
)
from passes.capture.written_attention import WrittenAttention
from passes.errors import CaptureError
from passes.program.fakes import told_once
from passes.program.graphs import graph_module
from passes.program.precision import Precision, dtype_text
from passes.program.program import Guards, Input, Output, Program
from passes.program.provenance import Provenance, error_line, place_of, shortened, torch_function_of

_RAISED = "the model's forward raised"


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_dims: Sequence[int | None] | None = None,
    batch_size: int | None = None,
    tangents: Tangents = "loss",
    backward: bool = True,
    precision: Precision | None = None,
    fused_attention: bool = False,
) -> Program:
    """The training step of `model` on the global batch `(args, kwargs)`, normalised.

    `batch_dims` has the batch dim of each leaf of `(args, kwargs)` and `batch_size` the global batch size; an output
    whose dim 0 is a multiple of `batch_size` is taken to have its batch there, until the analysis tells
    (`inputs.global_inputs` gives both).

    `tangents="loss"`: where the model returns a differentiable scalar, it alone gets a tangent: the one called `loss`,
    else every such scalar. `tangents="all"`, or no scalar: every differentiable output gets one. A gradient is that of
    sum(output * tangent). Without `backward`, under `torch.no_grad`, or where nothing requires a gradient, the program
    is the forward alone. `precision`: what it computes in, where that is not the model's own dtypes. `fused_attention`:
    attention that the model writes out is the op that fused kernels are known by, for prices alone: it leaves out what
    such a kernel does to scores besides (`written_attention`).

    Constants of the model's code that are no plain `full` or `arange` are buffers of the graph module, read by
    `get_attr` nodes. Where the model reads a value that follows from the inputs and buffers alone, the graph is that of
    inputs which give the same, with a note, and the program's `guards` tell whether others do. Raises `CaptureError`
    where it depends on anything else.

    Under `torch.autocast` the forward is captured as it is cast, and the backward as autograd makes it outside.
    """
    backward = backward and torch.is_grad_enabled()
    asked = _Asked(
        model, tuple(args), dict(kwargs or {}), batch_dims, batch_size, tangents, backward, precision or Precision(),
        autocast_dtype(), fused_attention,
    )  # fmt: skip
    with settled(), autocast_as(None), torch.inference_mode(False), torch.set_grad_enabled(backward):
        # Eager's numbers are the ones to give, so its branches come first, though a compiled model's read less.
        try:
            return _capture(asked, Branches())
        except ReadsInputsError:
            with suppress(CaptureError):
                return _capture(asked, Branches(may_read_inputs=True))
        except TooLargeToReadError:
            raise
        except CaptureError:
            pass
        try:
            return _capture(asked, Branches(may_read_inputs=True, as_compiled=True))
        except CaptureError as error:
            if helps := _of_rows(asked, error) + _of_experts(model, error):
                raise CaptureError(f"{str(error).rstrip('.')}{helps}") from error
            failed = error
        try:
            return _capture(asked, Branches(may_read_inputs=True, every_row=True))
        except PickedRowsError as picked:
            raise picked from failed
        except CaptureError:
            raise failed from None


@dataclass(frozen=True)
class _Asked:
    """What `capture` was asked for; `autocast`: the dtype of `torch.autocast` around it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_dims: Sequence[int | None] | None
    batch_size: int | None
    tangents: Tangents
    backward: bool
    precision: Precision
    autocast: torch.dtype | None
    fused_attention: bool


def _of_rows(asked: _Asked, error: CaptureError) -> str:
    """Where the forward failed: inputs that were taken for several rows per sample, or for one number of each, and may
    be none of the batch."""
    leaves, _, names = flatten_inputs(asked.args, asked.kwargs)
    dims, batch_size = asked.batch_dims or [None] * len(leaves), asked.batch_size
    rows = {
        name: leaf.shape[dim] // batch_size
        for name, leaf, dim in zip(names, leaves, dims, strict=True)
        if dim is not None and batch_size and (leaf.shape[dim] > batch_size or leaf.dim() == 1)
    }
    if not rows or _RAISED not in str(error):
        return ""
    told = " and ".join(
        f"{name!r} was taken for {f'{count} rows' if count > 1 else 'one number'} per sample"
        for name, count in rows.items()
    )
    return f". Input {told}; where all samples share it, say Options(batch_dims={dict.fromkeys(rows)})"


def _of_experts(model: nn.Module, error: CaptureError) -> str:
    """What helps a model of `transformers` with routed experts that could not be captured, where it is known."""
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        return ""
    if getattr(getattr(model, "config", None), "_experts_implementation", None) == "eager":
        return (
            ". The model runs its experts in a Python loop: call model.set_experts_implementation('grouped_mm') before"
        )
    if "integrations/moe.py" in str(error) and _RAISED not in str(error):
        return ". Use transformers 5.23 or later, whose backward of experts in this dtype is an op, or bfloat16"
    return ""


def _capture(asked: _Asked, branches: Branches) -> Program:
    """The step with these of the model's branches."""
    model, precision, backward, batch_size = asked.model, asked.precision, asked.backward, asked.batch_size
    leaves, in_spec, names = flatten_inputs(asked.args, asked.kwargs)
    dims = list(asked.batch_dims) if asked.batch_dims is not None else [None] * len(leaves)
    if len(dims) != len(leaves):
        raise ValueError(f"batch_dims has {len(dims)} entries, but the inputs have {len(leaves)} leaves: {names}")
    provenance = Provenance()
    tracer = Tracer(fake_mode(), provenance, branches)
    held = slots_of(model, precision)
    user = [user_slot(name, leaf, dim, held) for name, leaf, dim in zip(names, leaves, dims, strict=True)]
    slots = [*held, *filter(None, user)]
    for slot in slots:
        slot.place(tracer, backward)
    extra, notes = extra_arguments(model, asked.args, asked.kwargs)

    with (
        tracer.leaving_values(),
        unchanged(model),
        torch.set_grad_enabled(backward),
        told_once(),
        tracing(tracer, WrittenAttention() if asked.fused_attention else None),
    ):
        for slot in slots:
            slot.wrap()
        for slot in held:
            slot.swap_in()
        rebind(model, {id(slot.tensor): slot.view for slot in held})
        kept = dict(attributes(model).values()) | empty_buffers(model)
        values = [
            leaf if slot is None else precision.cast_input(slot.view) for slot, leaf in zip(user, leaves, strict=True)
        ]
        traced_args, traced_kwargs = pytree.tree_unflatten(values, in_spec)
        with provenance.watching(model):
            with autocast_as(asked.autocast), settings_read(model) as read:
                out = run_model(model, traced_args, {**traced_kwargs, **extra})
            refuse_hidden_tensors(leaves, names)
            refuse_own_backward(slots, tracer.went_back)
            result, more_notes = flatten_outputs(out, precision)
            given = tangents_of(tracer, result, asked.tangents) if backward else []
            with provenance.backward():
                found = gradients(given, slots)
        outputs, nodes = _outputs(tracer, result, held, found, backward, batch_size)
        changed = {output.name for output in outputs if output.kind == "buffer"}
        more_notes += mutated_notes([slot for slot in slots if slot.input.name not in changed])
        now = dict(attributes(model).values()) | dict(model.named_buffers())
        left = left_behind(model, [tensor for _, tensor in result.tensors])
        more_notes += attribute_notes(kept, now, but={*left, *(read.after - read.before)})
        more_notes += [left_note(left)] if left else []
        more_notes += precision.notes([slot.tensor for slot in held if slot.input.kind == "parameter"])

    _refuse_mixed_products(tracer.graph)
    known = {tracer.node_of(slot.fake): slot.input for slot in slots}
    guards = guards_of(tracer.root, tracer.reads, known, changed, tracer.picking.picks)
    more_notes += _changing_notes(guards)
    tracer.graph.output(tuple(nodes))
    if branches.every_row:
        picked_as_all(tracer.graph, tracer.picking.picks, tracer.picking.asked)
    program = Program(
        graph=graph_module(tracer.root, tracer.graph, class_name="Step"),
        inputs=_inputs(slots, given, {slot.input.name for slot, _ in found}, batch_size),
        outputs=tuple(outputs),
        out_spec=result.spec,
        out_constants=result.constants,
        aliases={alias: slot.input.name for slot in held for alias in slot.aliases},
        notes=tuple(dict.fromkeys([*notes, *more_notes, *tracer.notes])),
        left=left,
        has_loss=bool(given) and all(t.is_loss for t in given),
        guards=guards,
        settings=read.settings,
        constants=tuple(tracer.constants),
    )
    return normalize(program)


_OF_ONE_DTYPE = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})


def _refuse_mixed_products(graph: fx.Graph) -> None:
    """Fake tensors multiply what torch refuses to.

    Raises:
        CaptureError: a product of tensors of several dtypes.
    """
    for node in graph.nodes:
        if node.target not in _OF_ONE_DTYPE:
            continue
        dtypes = dict.fromkeys(dtype_text(operand.meta["val"].dtype) for operand in node.all_input_nodes)
        if len(dtypes) > 1:
            raise CaptureError(
                f"{place_of(node)}: a product of {' and '.join(dtypes)}, which torch refuses; cast one of them, as in "
                "x.to(weight.dtype). Casting a model or mp_policy leaves buffers and constants, or inputs, in another "
                "dtype than parameters"
            )


def _outputs(
    tracer: Tracer,
    result: Result,
    held: Sequence[Slot],
    found: Sequence[tuple[Slot, Tensor]],
    backward: bool,
    batch_size: int | None,
) -> tuple[list[Output], list[fx.Node]]:
    """What the step gives: what the model returned, what it wrote to, gradients; and the nodes that yield it."""
    changed = [(slot, new) for slot in held if (new := slot.changed()) is not None]
    for slot, new in changed:
        _refuse_another_kind(tracer, slot, new)
    outputs = [
        *(
            Output("output", name, bool(backward and t.requires_grad), _batch_dim(t, batch_size))
            for name, t in result.tensors
        ),
        *(Output("buffer", slot.input.name) for slot, _ in changed),
        *(Output("gradient", slot.input.name, False, slot.input.batch_dim) for slot, _ in found),
    ]
    tensors = [t for _, t in (*result.tensors, *changed, *found)]
    return outputs, [tracer.node_of(unwrapped(t)) for t in tensors]


def _refuse_another_kind(tracer: Tracer, slot: Slot, new: Tensor) -> None:
    """A step's graph is of the shapes and dtypes that the first one finds.

    Raises:
        CaptureError: the forward puts a tensor of another shape or dtype in a buffer's place.
    """
    old = slot.tensor
    if (new.shape, new.dtype) == (old.shape, old.dtype):
        return
    was, now = (f"{dtype_text(each.dtype)}{list(each.shape)}" for each in (old, new))
    helps = f"register it as {dtype_text(new.dtype)}, or write to it in place (copy_), which keeps its dtype"
    if new.shape != old.shape:
        helps = "register it as large as it gets, and write to it in place"
    raise CaptureError(
        f"{place_of(tracer.node_of(unwrapped(new)))}: the {slot.input.kind} {slot.input.name} is {was} and the forward "
        f"makes it {now}, so that the next step would be another graph; {helps}"
    )


def _inputs(
    slots: Sequence[Slot], given: Sequence[Tangent], trained: Collection[str], batch_size: int | None
) -> tuple[Input, ...]:
    """What the step reads, tangents last; what is `trained` has a gradient."""
    return (
        *(replace(slot.input, requires_grad=slot.input.name in trained) for slot in slots),
        *(Input("tangent", t.name, False, _batch_dim(t.output, batch_size)) for t in given),
    )


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model returns; an error of its own becomes a `CaptureError` that names the line."""
    try:
        return model(*args, **kwargs)
    except CaptureError:
        raise
    except Exception as error:
        file, line = error_line(error)
        where = f"{file}:{line}" if file else type(model).__name__
        if _passed_through_flex_attention(error):
            raise CaptureError(
                f"{where}: FlexAttention is not supported, as its mask is a function that no rule can split; use "
                "attn_implementation='sdpa', or torch.nn.functional.scaled_dot_product_attention with a mask"
            ) from error
        if _raised_by_distributed(error):
            raise CaptureError(f"{where}: asks for other ranks: {NO_OTHER_RANKS}") from error
        if "mutating a non-functional tensor" in str(error):
            raise CaptureError(f"{where}: {WRITES_OUTSIDE}") from error
        if "its data is not allocated yet" in str(error):
            reads = torch_function_of(error) or "an op"
            raise CaptureError(
                f"{where}: {reads} reads the values of a tensor in code where no trace sees it. Use ops of tensors: "
                "sequences of several lengths can be padded to one, with torch.where behind each end"
            ) from error
        raise CaptureError(f"{where}: {_RAISED} {type(error).__name__}: {error}") from error


def _raised_by_distributed(error: BaseException) -> bool:
    """Whether it was raised in the code of `torch.distributed`."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return "/torch/distributed/" in frame.f_code.co_filename


def _passed_through_flex_attention(error: BaseException) -> bool:
    """Whether torch's code of FlexAttention was running when it was raised."""
    running = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(file.endswith("torch/nn/attention/flex_attention.py") for file in running)


def extra_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A cache of keys and values is of no use in training: `use_cache=False` where a model would make one.

    What a model without a config means by that name is its own matter.
    """
    signature = inspect.signature(model.forward)
    if "use_cache" not in signature.parameters or getattr(model, "config", None) is None:
        return {}, []
    try:
        bound = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:  # the call below raises the same, with its place
        return {}, []
    if bound.get("use_cache") is not None:
        return {}, []
    made = getattr(model.config, "use_cache", False)
    if made and bound.get("position_ids") is not None and bound.get("attention_mask") is None:
        # transformers tells packed sequences by their positions, but only where it makes no cache.
        return {}, [
            "position_ids without an attention_mask: the model makes a cache, as in eager, and with one transformers "
            "does not keep packed sequences apart; pass use_cache=False if it should"
        ]
    return {"use_cache": False}, ["use_cache=False: the step makes no key-value cache"] if made else []


def _changing_notes(guards: Guards | None) -> list[str]:
    """Of values that were read and follow from what the step itself changes."""
    return [
        f"{shortened(fixed.where)}: {fixed.what}, which follows from what the step writes to the buffer "
        f"{' and '.join(fixed.written)}: each new value is captured and planned anew. A position that stays a tensor "
        "(index_copy_ at (position + torch.arange(n)) % size) and a branch by torch.where are captured once"
        for fixed in (guards.fixed if guards else ())
        if fixed.written
    ]


def _batch_dim(tensor: Tensor, batch_size: int | None) -> int | None:
    if not batch_size or tensor.dim() == 0 or tensor.shape[0] == 0 or tensor.shape[0] % batch_size:
        return None
    return 0
