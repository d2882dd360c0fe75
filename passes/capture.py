"""`capture`: an unmodified module and example inputs in, its whole training step as one `Program` out.

    placeholders -> model(...) -> outputs -> autograd.grad -> graph -> normalize

The model's parameters and buffers are swapped for tracing tensors while its forward runs, and put back afterwards with
every other attribute of its modules.
"""

from __future__ import annotations

import dataclasses
import inspect
import traceback
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from passes.autocast import autocast_as, autocast_dtype
from passes.errors import CaptureError
from passes.fakes import told_once
from passes.graphs import graph_module
from passes.guards import guards_of
from passes.inputs import flatten_inputs, path_name, refuse_hidden_tensors
from passes.left_behind import functions_of, left_behind, left_note
from passes.normalize import normalize
from passes.precision import Precision, dtype_text
from passes.program import Guards, Input, InputKind, Output, Program
from passes.provenance import Provenance, error_line, place_of, shortened
from passes.rebind import rebind
from passes.settings import attributes, settings_read
from passes.tracing import (
    NO_OTHER_RANKS,
    WRITES_OUTSIDE,
    Branches,
    ReadsInputsError,
    TooLargeToReadError,
    Tracer,
    fake_mode,
    tracing,
    unwrapped,
    wrapped,
)

Tangents = Literal["loss", "all"]
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
) -> Program:
    """The training step of `model` on the global batch `(args, kwargs)`, normalised.

    `batch_dims` has the batch dim of each leaf of `(args, kwargs)` and `batch_size` the global batch size; an output
    whose dim 0 is a multiple of `batch_size` is taken to have its batch there, until the analysis tells
    (`inputs.global_inputs` gives both).

    `tangents="loss"`: where the model returns a differentiable scalar, it alone gets a tangent: the one called `loss`,
    else every such scalar. `tangents="all"`, or no scalar: every differentiable output gets one. A gradient is that of
    sum(output * tangent). Without `backward`, under `torch.no_grad`, or where nothing requires a gradient, the program
    is the forward alone. `precision`: what it computes in, where that is not the model's own dtypes.

    Constants of the model's code that are no plain `full` or `arange` are buffers of the graph module, read by
    `get_attr` nodes. Where the model reads a value that follows from the inputs and buffers alone, the graph is that of
    inputs which give the same, with a note, and the program's `guards` tell whether others do. Raises `CaptureError`
    where it depends on anything else.

    Under `torch.autocast` the forward is captured as it is cast, and the backward as autograd makes it outside.
    """
    backward = backward and torch.is_grad_enabled()
    precision = precision or Precision()
    dtype = autocast_dtype()
    with autocast_as(None), torch.inference_mode(False), torch.set_grad_enabled(backward):

        def taken(branches: Branches) -> Program:
            return _capture(model, args, kwargs, batch_dims, batch_size, tangents, backward, precision, dtype, branches)

        # Eager's numbers are the ones to give, so its branches come first, though a compiled model's read less.
        try:
            return taken(Branches())
        except ReadsInputsError:
            with suppress(CaptureError):
                return taken(Branches(may_read_inputs=True))
        except TooLargeToReadError:
            raise
        except CaptureError:
            pass
        try:
            return taken(Branches(may_read_inputs=True, as_compiled=True))
        except CaptureError as error:
            helps = _of_rows(args, kwargs, batch_dims, batch_size, error)
            if getattr(model, "_can_set_experts_implementation", lambda: False)():
                helps += _of_experts(model, error)
            if not helps:
                raise
            raise CaptureError(f"{str(error).rstrip('.')}{helps}") from error


def _of_rows(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    batch_dims: Sequence[int | None] | None,
    batch_size: int | None,
    error: CaptureError,
) -> str:
    """Where the forward failed: inputs that were taken for several rows per sample, or for one number of each, and may
    be none of the batch."""
    leaves, _, names = flatten_inputs(tuple(args), dict(kwargs or {}))
    dims = batch_dims or [None] * len(leaves)
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
    if getattr(getattr(model, "config", None), "_experts_implementation", None) == "eager":
        return (
            ". The model runs its experts in a Python loop: call model.set_experts_implementation('grouped_mm') before"
        )
    if "integrations/moe.py" in str(error):
        return ". Use transformers 5.23 or later, whose backward of experts in this dtype is an op, or bfloat16"
    return ""


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    batch_dims: Sequence[int | None] | None,
    batch_size: int | None,
    tangents: Tangents,
    backward: bool,
    precision: Precision,
    autocast: torch.dtype | None,
    branches: Branches,
) -> Program:
    call_args, call_kwargs = tuple(args), dict(kwargs or {})
    leaves, in_spec, names = flatten_inputs(call_args, call_kwargs)
    dims = list(batch_dims) if batch_dims is not None else [None] * len(leaves)
    if len(dims) != len(leaves):
        raise ValueError(f"batch_dims has {len(dims)} entries, but the inputs have {len(leaves)} leaves: {names}")
    provenance = Provenance()
    tracer = Tracer(fake_mode(), provenance, branches)
    held = _slots(model, precision)
    user = [_user_slot(name, leaf, dim) for name, leaf, dim in zip(names, leaves, dims, strict=True)]
    slots = [*held, *filter(None, user)]
    for slot in slots:
        slot.place(tracer, backward)
    extra, notes = extra_arguments(model, call_args, call_kwargs)

    with _unchanged(model), torch.set_grad_enabled(backward), told_once(), tracing(tracer):
        for slot in slots:
            slot.wrap()
        for slot in held:
            slot.swap_in()
        rebind(model, {id(slot.tensor): slot.view for slot in held})
        kept = dict(attributes(model).values()) | _empty_buffers(model)
        values = [
            leaf if slot is None else precision.cast_input(slot.view) for slot, leaf in zip(user, leaves, strict=True)
        ]
        traced_args, traced_kwargs = pytree.tree_unflatten(values, in_spec)
        with provenance.watching(model):
            with autocast_as(autocast), settings_read(model) as read:
                out = run_model(model, traced_args, {**traced_kwargs, **extra})
            refuse_hidden_tensors(leaves, names)
            result, more_notes = _flatten_outputs(out, precision)
            given = _tangents(tracer, result, tangents) if backward else []
            with provenance.backward():
                found = gradients(given, slots)
        outputs, nodes = _outputs(tracer, result, held, found, backward, batch_size)
        changed = {output.name for output in outputs if output.kind == "buffer"}
        more_notes += _mutated_notes([slot for slot in slots if slot.input.name not in changed])
        now = dict(attributes(model).values()) | dict(model.named_buffers())
        left = left_behind(model, [tensor for _, tensor in result.tensors])
        more_notes += _attribute_notes(kept, now, but={*left, *(read.after - read.before)})
        more_notes += [left_note(left)] if left else []
        more_notes += precision.notes([slot.tensor for slot in held if slot.input.kind == "parameter"])

    _refuse_mixed_products(tracer.graph)
    guards = guards_of(tracer.root, tracer.reads, {tracer.node_of(slot.fake): slot.input for slot in slots}, changed)
    more_notes += _changing_notes(guards)
    tracer.graph.output(tuple(nodes))
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
    result: _Result,
    held: Sequence[_Slot],
    found: Sequence[tuple[_Slot, Tensor]],
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


def _refuse_another_kind(tracer: Tracer, slot: _Slot, new: Tensor) -> None:
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
    slots: Sequence[_Slot], given: Sequence[_Tangent], trained: Collection[str], batch_size: int | None
) -> tuple[Input, ...]:
    """What the step reads, tangents last; what is `trained` has a gradient."""
    return (
        *(dataclasses.replace(slot.input, requires_grad=slot.input.name in trained) for slot in slots),
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
        if _passed_through(error, "flex_attention"):
            raise CaptureError(
                f"{where}: FlexAttention is not supported, as its mask is a function that no rule can split; use "
                "attn_implementation='sdpa', or torch.nn.functional.scaled_dot_product_attention with a mask"
            ) from error
        if _raised_by_distributed(error):
            raise CaptureError(f"{where}: asks for other ranks: {NO_OTHER_RANKS}") from error
        if "mutating a non-functional tensor" in str(error):
            raise CaptureError(f"{where}: {WRITES_OUTSIDE}") from error
        raise CaptureError(f"{where}: {_RAISED} {type(error).__name__}: {error}") from error


def _raised_by_distributed(error: BaseException) -> bool:
    """Whether it was raised in the code of `torch.distributed`."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return "/torch/distributed/" in frame.f_code.co_filename


def _passed_through(error: BaseException, module: str) -> bool:
    """Whether a file of that name in torch's own attention code was running when it was raised."""
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_code.co_filename.endswith(f"torch/nn/attention/{module}.py"):
            return True
        place = place.tb_next
    return False


# ----------------------------------------------------------------------------------------------------------- inputs
@dataclass(eq=False)
class _Slot:
    """A tensor that the step reads: where it lives in the model, and what stands for it while tracing."""

    input: Input
    tensor: Tensor
    holders: tuple[tuple[dict[str, Any], str], ...] = ()
    aliases: tuple[str, ...] = ()
    differentiate: bool = False

    def place(self, tracer: Tracer, backward: bool) -> None:
        like = self.tensor
        if self.input.dtypes is not None:
            like = torch.empty_strided(like.shape, like.stride(), dtype=self.input.dtypes.computed, device="meta")
        self.fake = tracer.placeholder(self.input.name, like)
        self.differentiate = backward and self.input.requires_grad
        node = tracer.node_of(self.fake)
        if self.input.kind == "parameter":
            tracer.values.set_unknown(node, f"the parameter {self.input.name}")
        elif type(self.tensor) in (Tensor, nn.Buffer) and self.tensor.device.type != "meta":
            tracer.values.set(node, self.tensor.detach().cpu(), is_input=self.input.kind == "input")
        else:
            tracer.values.set_unknown(
                node, f"the {self.input.kind} {self.input.name}, whose values are not known (it is meta or fake)"
            )

    def wrap(self) -> None:
        self.view = wrapped(self.fake, self.differentiate)
        if self.input.kind == "parameter":
            # `nn.ParameterList` and others make a new parameter of a tensor that is none.
            self.view._is_param = True

    def swap_in(self) -> None:
        for holder, key in self.holders:
            holder[key] = self.view

    def changed(self) -> Tensor | None:
        """The new value of a buffer, or of a parameter as it is stored, where the forward wrote one."""
        if self.input.kind == "parameter":
            kept = self.input.dtypes is None or self.input.dtypes.stored == self.input.dtypes.computed
            return self.view if kept and unwrapped(self.view) is not self.fake else None
        if self.input.kind != "buffer":
            return None
        holder, key = self.holders[0]
        now = holder.get(key)
        if isinstance(now, Tensor) and unwrapped(now) is not self.fake:
            return now
        return None


def _slots(model: nn.Module, precision: Precision) -> list[_Slot]:
    """The model's parameters, then its buffers; tied ones once."""
    found: dict[int, tuple[InputKind, Tensor, list[str], list[tuple[dict[str, Any], str]]]] = {}
    kinds: tuple[InputKind, InputKind] = ("parameter", "buffer")
    for kind in kinds:
        for prefix, module in model.named_modules():
            holder: dict[str, Any] = module._parameters if kind == "parameter" else module._buffers
            for key, tensor in holder.items():
                if tensor is None:
                    continue
                entry = found.setdefault(id(tensor), (kind, tensor, [], []))
                entry[2].append(f"{prefix}.{key}" if prefix else key)
                entry[3].append((holder, key))
        for prefix, module in model.named_modules(remove_duplicate=False):
            for key, tensor in (module._parameters if kind == "parameter" else module._buffers).items():
                name = f"{prefix}.{key}" if prefix else key
                if tensor is not None and name not in found[id(tensor)][2]:
                    found[id(tensor)][2].append(name)
    slots = []
    for kind, tensor, names, holders in found.values():
        is_parameter = kind == "parameter"
        dtypes = precision.dtypes_of(tensor) if is_parameter else None
        what = Input(kind, names[0], is_parameter and tensor.requires_grad, dtypes=dtypes)
        slots.append(_Slot(what, tensor, tuple(holders), tuple(names[1:])))
    return slots


def _user_slot(name: str, leaf: Any, batch_dim: int | None) -> _Slot | None:
    if not isinstance(leaf, Tensor):
        return None
    return _Slot(Input("input", name, leaf.requires_grad and torch.is_grad_enabled(), batch_dim), leaf)


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


# ---------------------------------------------------------------------------------------------------------- outputs
@dataclass(frozen=True)
class _Result:
    tensors: list[tuple[str, Tensor]]
    spec: pytree.TreeSpec
    constants: dict[int, Any]


@dataclass(frozen=True)
class _Tangent:
    name: str
    output: Tensor
    tangent: Tensor
    is_loss: bool


def _flatten_outputs(out: Any, precision: Precision) -> tuple[_Result, list[str]]:
    """What the model returned, as tensors with the names of their paths, and constants by leaf index."""
    while unknown := {type(x) for x in pytree.tree_leaves(out) if dataclasses.is_dataclass(x)}:
        for cls in unknown:
            pytree.register_dataclass(cls)
    try:
        paths, spec = pytree.tree_flatten_with_path(out)
        named = [(path_name(path), leaf) for path, leaf in paths]
    except (ValueError, NotImplementedError):  # a container that does not name its parts
        leaves, spec = pytree.tree_flatten(out)
        named = [(str(i), leaf) for i, leaf in enumerate(leaves)]
    tensors: list[tuple[str, Tensor]] = []
    constants: dict[int, Any] = {}
    notes: list[str] = []
    for i, (name, leaf) in enumerate(named):
        if isinstance(leaf, Tensor):
            tensors.append((name, precision.cast_output(leaf)))
        elif leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes, torch.dtype, torch.Size)):
            constants[i] = leaf
        else:
            constants[i] = None
            notes.append(f"output {name or 'of the model'}: a {type(leaf).__name__} is returned as None")
    return _Result(tensors, spec, constants), notes


def _tangents(tracer: Tracer, result: _Result, which: Tangents) -> list[_Tangent]:
    """The outputs to differentiate, each with a new placeholder for its tangent."""
    able = [(name, t) for name, t in result.tensors if t.requires_grad and (t.is_floating_point() or t.is_complex())]
    scalars = [(name, t) for name, t in able if t.dim() == 0 and t.is_floating_point()]
    loss = [(name, t) for name, t in scalars if name.rpartition(".")[2] == "loss"] or scalars
    chosen = loss if which == "loss" and loss else able
    out = []
    for name, t in chosen:
        like = torch.empty(t.shape, dtype=t.dtype, device="meta")
        fake = tracer.placeholder(f"tangent_{name or 'output'}", like)
        tracer.values.set_unknown(tracer.node_of(fake), "a tangent")
        out.append(_Tangent(name, t, wrapped(fake, False), chosen is loss))
    return out


def gradients(given: list[_Tangent], slots: list[_Slot]) -> list[tuple[_Slot, Tensor]]:
    wanted = [slot for slot in slots if slot.differentiate]
    if not given or not wanted:
        return []
    outputs, views, tangents = [t.output for t in given], [slot.view for slot in wanted], [t.tangent for t in given]
    found: Sequence[Tensor | None]
    try:
        if _has_own_functions(outputs):
            torch.autograd.backward(outputs, tangents)
            found = [view.grad for view in views]
        else:
            found = torch.autograd.grad(outputs, views, tangents, allow_unused=True)
    except CaptureError:
        raise
    except Exception as error:
        file, line = error_line(error)
        where = f"{file}:{line}: " if file else ""
        raise CaptureError(
            f"{where}the backward of {', '.join(t.name for t in given)} raised {type(error).__name__}: {error}"
        ) from error
    return [(slot, grad) for slot, grad in zip(wanted, found, strict=True) if grad is not None]


def _has_own_functions(outputs: list[Tensor]) -> bool:
    """Whether a `torch.autograd.Function` made some of it.

    Its backward may run one of its own, as checkpointing with `use_reentrant=True` does: that leaves gradients in
    `.grad` alone, and `torch.autograd.grad` refuses it, or does not reach it where its inputs lead to no parameter.
    """
    return any(isinstance(each, torch.autograd.function.BackwardCFunction) for each in functions_of(outputs))


def _mutated_notes(slots: Sequence[_Slot]) -> list[str]:
    written = [slot.input for slot in slots if unwrapped(slot.view) is not slot.fake]
    return [
        f"{what.kind} {what.name}: the forward writes to it in place; only the graph sees what it wrote"
        for what in written
        if what.kind != "buffer"
    ]


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


# ----------------------------------------------------------------------------------------------------- side effects
def _empty_buffers(model: nn.Module) -> dict[str, None]:
    """Buffers without a tensor, by name."""
    return {
        f"{prefix}.{key}" if prefix else key: None
        for prefix, module in model.named_modules()
        for key, value in module._buffers.items()
        if value is None
    }


def _attribute_notes(before: Mapping[str, Any], after: Mapping[str, Any], but: Collection[str]) -> list[str]:
    """Of attributes that eager's next call would find changed; those that it has overwritten by the time it reads them
    (the weight that `torch.nn.utils.weight_norm` makes of its two parts) are not."""

    def changed(old: Any, new: Any) -> bool:
        return old is not new and (isinstance(old, Tensor) or isinstance(new, Tensor) or old != new)

    return [
        f"attribute {name}: the forward changes it, and every step finds it as the first one did; what one step leaves "
        "to the next is for a buffer that is a tensor from the start"
        for name, old in before.items()
        if name in after and name not in but and changed(old, after[name])
    ]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back, afterwards, every attribute of the model's modules, and what their lists, dicts and sets held."""
    before = []
    for module in model.modules():
        attributes = dict(module.__dict__)
        held = {k: v.copy() for k, v in attributes.items() if type(v) in (dict, OrderedDict, list, set)}
        before.append((module, attributes, held))
    try:
        yield
    finally:
        for module, attributes, held in before:
            for key, content in held.items():
                _restore(attributes[key], content)
            _restore(module.__dict__, attributes)


def _restore(container: Any, content: Any) -> None:
    if len(container) == len(content) and all(
        (a is b) for a, b in zip(_parts(container), _parts(content), strict=True)
    ):
        return
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _parts(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        for key, value in container.items():
            yield key
            yield value
    else:
        yield from container
