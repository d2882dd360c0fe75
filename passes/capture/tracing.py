"""The tracer: runs Python code on fake tensors and records every aten op below autograd and functionalisation.

    model code -> autograd -> functionalisation (C++) -> `Tracer` (decompose, record) -> fake tensors

Autograd runs above, so forward and backward land in one graph; functionalisation has turned in-place ops and writes
through views into pure ones. The tracer is a dispatch mode of its own, not `make_fx`: a node then costs about one fake
dispatch, carries where it came from at once, and a value that the model reads can be answered (see `values`). What else
is in force while a model runs so is in `surroundings`.

All use of torch's private tracing API is in these files, `provenance` and, of fake tensors, `fakes`.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from passes.capture.decompositions import DECOMPOSITIONS
from passes.capture.guards import Read, shapes
from passes.capture.outliving import give_values, remade
from passes.capture.picked_rows import PICKS
from passes.capture.picking import Picking
from passes.capture.values import ExampleValues, TooLargeError, UnknownValueError, off_the_record, run_real
from passes.errors import CaptureError
from passes.program.fakes import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from passes.program.program import Constant, Fixed
from passes.program.provenance import IN_ANOTHER_THREAD, Place, Provenance, model_line, short_location, torch_function
from passes.program.spans import span_of

aten = torch.ops.aten

_SAME_VALUE = {aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift.default}
_CHECKS = {
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
}
_READS = {aten._local_scalar_dense.default, aten.equal.default}
_SHAPED_BY_INTEGERS = {aten._ctc_loss.Tensor}
_INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor}
_PUTTING = {aten.index_put.default, aten._unsafe_index_put.default}
_MAX_INLINE_ELEMENTS = 2**24
WRITES_OUTSIDE = (
    "writes in place to a tensor that is no parameter, buffer or input, so that what it wrote would be lost; register "
    "it as a buffer"
)
_COLLECTIVES = {"c10d", "_c10d_functional", "_c10d_functional_autograd"}
NO_OTHER_RANKS = (
    "a step is captured as one device computes it on the global batch, where torch.distributed is not initialised, so "
    "there is nothing to exchange; leave that out where dist.is_initialized() is False"
)
_BRANCHES_INSTEAD = (
    "Use tensor ops (torch.where, masks) instead, or make it a constant of the model; a number for a log is better "
    "returned as a tensor and read outside"
)
_WITHOUT_CHECKS_INSTEAD = (
    "Leave out its checks, where an argument does (validate_args=False), or write out in the model what it computes"
)
_PICKS_INSTEAD = (
    "Compute every row and multiply what was not picked by zero, or sort rows by where they go (torch.argsort): shapes "
    "then depend on no values"
)


class ReadsInputsError(CaptureError):
    """The model reads a value that follows from its inputs, where it may not."""


class TooLargeToReadError(CaptureError):
    """The model reads a value that follows from a tensor too large to compute on this host."""


@dataclass(frozen=True)
class Branches:
    """Which branches a model takes while it is traced.

    `may_read_inputs`: those that follow from what its inputs hold (is there any padding?), for inputs that hold the
    same. `as_compiled`: those of a model that is told, by `torch.compiler.is_compiling`, that it is being compiled:
    fewer values are read there, but some models compute something else. `every_row`: where parameters say which rows a
    mask picks, all are computed (`picked_rows`).
    """

    may_read_inputs: bool = False
    as_compiled: bool = False
    every_row: bool = False


class Tracer(TorchDispatchMode):
    """Records ops on fake tensors into `graph`; `root` holds constants that are not inputs."""

    def __init__(self, fake_mode: FakeTensorMode, provenance: Provenance, branches: Branches) -> None:
        super().__init__()
        self.branches = branches
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values = ExampleValues()
        self.notes: list[str] = []
        self.reads: list[Read] = []
        self.constants: list[Constant] = []
        self.picking = Picking(self.values, self.location)
        self.went_back = ""
        """Where the model called `backward`, if it did."""
        self.fake_mode = fake_mode
        self._provenance = provenance
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []
        self._constant_of: dict[int, Tensor] = {}
        self._remade: dict[fx.Node, Any] = {}
        self._drawn: dict[Any, Any] = {}
        self._random_state = _random_state()
        self._last_placeholder: fx.Node | None = None

    # ------------------------------------------------------------------------------------------- inputs and outputs
    def placeholder(self, name: str, like: Tensor) -> Tensor:
        """A fake CPU tensor of `like`'s shape, strides and dtype that is an input of the graph."""
        if like.layout != torch.strided:
            raise CaptureError(f"{name}: a {like.layout} tensor; only strided tensors are supported")
        fake = self._fake_like(like)
        last = self._last_placeholder
        with self.graph.inserting_before() if last is None else self.graph.inserting_after(last):
            node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.target = node.name  # a name of its own: two inputs may read the same once dots are gone
        self._last_placeholder = node
        self._set(node, fake, Place("forward", "", ""))
        self._nodes[id(fake)] = node
        return fake

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Node that yields `tensor`: a fake tensor of this trace, or any other, which becomes a constant."""
        found = self._nodes.get(id(tensor))
        return found if found is not None else self._nodes[id(self._constant(tensor))]

    # --------------------------------------------------------------------------------------------------- recording
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with torch._C._DisableAutocast():  # it has cast what the model called; decompositions call more
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func in _CHECKS:
            return None
        if func in _SAME_VALUE:
            return self._same(func, args[0])
        if func in _READS:
            return self._read(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if self.picking.picks and args:
            self.picking.refuse_counting(self._nodes.get(id(args[0])), func, args, kwargs)
        decomposition = DECOMPOSITIONS.get(func)
        if decomposition is not None:
            with self:
                out = decomposition(*args, **kwargs)
            if out is not NotImplemented:
                return out
        self._refuse(func, args)
        if func in _INDEXING or (func in _PUTTING and self._puts_picked(args)):
            args = self._without_masks(args)
        try:
            return self._record(func, args, kwargs)
        except DynamicOutputShapeException:
            return self._record_dynamic(func, args, kwargs)
        except DataDependentOutputException:
            return self._read(func, args, kwargs)
        except (ValueError, RuntimeError):
            # A decomposition may leave other strides than the op it replaces; a view then needs a copy.
            if func is not aten.view.default or args[0].is_contiguous():
                raise
            with self:
                copy = aten.clone.default(args[0], memory_format=torch.contiguous_format)
                return aten.view.default(copy, args[1])

    def _refuse(self, func: Any, args: tuple[Any, ...]) -> None:
        """Raises `CaptureError` for an op that no graph can have."""
        if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # Inductor refuses it too; a model that is being compiled takes another way.
            raise CaptureError(f"{self.location()}: grouped_mm of {args[0].dtype} cannot be compiled; use bfloat16")
        if func is aten.native_batch_norm.default and args[3] is not None and args[5]:
            raise CaptureError(
                f"{self.location()}: a batch norm whose running statistics would be lost; call "
                "torch.nn.functional.batch_norm or torch.nn.BatchNorm"
            )
        if func.namespace in _COLLECTIVES:
            raise CaptureError(f"{self.location()}: {func} between ranks: {NO_OTHER_RANKS}")
        if func._schema.is_mutable:
            if isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
                raise CaptureError(f"{self.location()}: {WRITES_OUTSIDE}")
            raise CaptureError(
                f"{self.location()}: {func} writes to its operands; use an op that returns what it wrote"
            )

    def _same(self, func: Any, x: Tensor) -> Tensor:
        x = x if isinstance(x, FakeTensor) else self._constant(x, detached=func is aten.detach.default)
        out: Tensor = func(x)
        self._nodes[id(out)] = self.node_of(x)
        self._alive.append(out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and _drops(func, args, kwargs):
            return self._record_random(func, args, kwargs)
        return self._record_plain(func, args, kwargs)

    def _record_random(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record a random op; where checkpointing runs a forward op again in the backward, take its numbers.

        Each random op moves the real random state on. Checkpointing sets that back before it runs a part again, so the
        state says which op is run again.
        """
        with off_the_record():
            state = _random_state()
            torch.rand(1)
            after = _random_state()
        key = (func, str(args), state)
        if not self._provenance.in_backward:
            if key in self._drawn:
                raise CaptureError(
                    f"{self.location()}: the forward set the random state back and draws the numbers of an earlier op "
                    "again; draw once and use the result twice"
                )
            if self._random_state != state:
                self._note(
                    f"{self.location(short=True)}: the forward sets torch's random state; what it draws is new in "
                    "each step all the same, by Options(seed=...)"
                )
            self._random_state = after
            self._drawn[key] = self._record_plain(func, args, kwargs)
        if key not in self._drawn:
            raise CaptureError(
                f"{self.location()}: the backward draws random numbers that no forward drew; where it runs the "
                "forward again, let torch.utils.checkpoint preserve the random state"
            )
        return self._drawn[key]

    def _record_plain(self, func: Any, args: Any, kwargs: Any) -> Any:
        node_args, args = self._map(args)
        node_kwargs, kwargs = self._map(kwargs)
        return self._emit(func, node_args, node_kwargs, func(*args, **kwargs))

    def _emit(self, func: Any, node_args: Any, node_kwargs: Any, out: Any) -> Any:
        if isinstance(out, Tensor) and out.layout != torch.strided:
            raise CaptureError(
                f"{self.location()}: {func} gives a {out.layout} tensor; only strided tensors are supported; an "
                "embedding takes sparse=False"
            )
        node_kwargs = {k: v for k, v in node_kwargs.items() if k not in ("layout", "pin_memory") and v is not None}
        node = self.graph.call_function(func, node_args, node_kwargs)
        place = self._provenance.here()
        self._set(node, out, place)
        self.picking.follow(node, out)
        if isinstance(out, Tensor):
            self._nodes[id(out)] = node
        elif isinstance(out, (tuple, list)):
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    item = self.graph.call_function(operator.getitem, (node, i))
                    self._set(item, part, place)
                    self.picking.follow(item, part)
                    self._nodes[id(part)] = item
        return out

    def _set(self, node: fx.Node, val: Any, place: Place) -> None:
        node.meta = {"val": val, "phase": place.phase, "module": place.module, "source": place.source}

    def _map(self, value: Any) -> tuple[Any, Any]:
        """`value` with nodes for tensors, and with fake tensors for real ones."""
        if isinstance(value, Tensor):
            fake = value if id(value) in self._nodes else self._constant(value)
            return self._nodes[id(fake)], fake
        if isinstance(value, (list, tuple)):
            pairs = [self._map(v) for v in value]
            return type(value)([a for a, _ in pairs]), type(value)([b for _, b in pairs])
        if isinstance(value, dict):
            both = {k: self._map(v) for k, v in value.items()}
            return {k: a for k, (a, _) in both.items()}, {k: b for k, (_, b) in both.items()}
        return value, value

    # --------------------------------------------------------------------------------------------------- constants
    def _constant(self, tensor: Tensor, detached: bool = False) -> Tensor:
        """A tensor from outside the trace, as a constructor where it is simple, else as a buffer of the graph.

        detached: it gets no gradient here; its values stay what they are, unless it is a leaf, which may be trained.
        """
        trains = tensor.requires_grad and torch.is_grad_enabled() and not isinstance(tensor, FakeTensor)
        if trains and (tensor.is_leaf or not detached):
            helps = "compute it from parameters in the forward, or detach() it"
            if tensor.is_leaf:
                helps = "register it (nn.ModuleList and nn.ParameterList do so for a list), or set requires_grad=False"
            raise CaptureError(
                f"{self.location()}: uses a {tuple(tensor.shape)} tensor that requires a gradient and is none of the "
                f"model's parameters, so that its gradient would be lost; {helps}"
            )
        known = self._constant_of.get(id(tensor))
        if known is not None:
            return known
        if tensor.is_nested:
            raise CaptureError(
                f"{self.location()}: makes a nested tensor, which no rule can split; pass rows padded to one length, "
                "or packed ones with a document's number for each token"
            )
        if (again := remade(tensor, self._remade, self._run, self._constant)) is not None:
            self._constant_of[id(tensor)] = again
            self._alive.append(tensor)
            return again
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.fake_mode:
            raise CaptureError(
                f"{self.location()}: uses a {tuple(tensor.shape)} tensor that was computed {IN_ANOTHER_THREAD}"
            )
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            raise CaptureError(
                f"{self.location()}: uses a {tuple(tensor.shape)} tensor without values (meta or fake) that is no "
                "parameter, buffer or input; register it as a buffer, or build the model on a real device"
            )
        if (span := span_of(tensor)) is not None:
            self.constants.append(Constant(self.location(), span))
        with off_the_record():
            value = tensor.detach().cpu().clone()
            simple = _simple(value)
        if simple is not None:
            constructor, args = simple
            with self:
                fake: Tensor = constructor(*args, dtype=value.dtype, device=value.device)
        else:
            name = f"_tensor_constant{len(self._constant_of)}"
            self.root.register_buffer(name, value)
            fake = self._fake_like(value)
            node = self.graph.get_attr(name)
            self._set(node, fake, self._provenance.here())
            self.values.set(node, value)
            self._nodes[id(fake)] = node
        self._constant_of[id(tensor)] = fake
        self._alive.append(tensor)
        return fake

    def _run(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        with self:
            return func(*args, **kwargs)

    @contextmanager
    def leaving_values(self) -> Iterator[None]:
        """Afterwards, what the model keeps of the trace outside of its modules has values."""
        try:
            yield
        finally:
            give_values(self._nodes, self.values, self.root)

    # -------------------------------------------------------------------------------- values that the model reads
    def value(self, tensor: Tensor, what: str, instead: str = _BRANCHES_INSTEAD) -> Any:
        """The real value of `tensor`, which the model reads as `what` says; noted where it depends on inputs."""
        node = self.node_of(tensor)
        try:
            value = self.values.of(node)
        except UnknownValueError as unknown:
            raise CaptureError(
                f"{self.location()}: {what}, which depends on {unknown.what}, so the step is not one graph. {instead}"
            ) from None
        except TooLargeError as large:
            raise TooLargeToReadError(
                f"{self.location()}: {what}, which follows from a tensor that is too large to compute on this host, "
                f"{large}; a smaller batch, or more micro-batches of it, will do"
            ) from None
        if not self.values.depends_on_inputs(node):
            return value
        if not self.branches.may_read_inputs:
            raise ReadsInputsError(f"{self.location()}: {what}, which depends on the inputs")
        self._note(f"{self.location(short=True)}: {what}; the graph is that of inputs which give the same")
        return value

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def values_read(self, tensor: Tensor, what: str) -> Tensor:
        """The real values of `tensor`, all of which the model reads."""
        value: Tensor = self.value(tensor, what)
        with off_the_record():  # the buffer or input itself may be written to later
            kept = value.clone()
        self.reads.append(Read(self.node_of(tensor), None, (), {}, Fixed(self.location(), what, kept)))
        return value

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.branches.every_row and (some := self.picking.answer(self.node_of(args[0]))) is not None:
            return some
        what, instead = "the model reads the value of a tensor", _BRANCHES_INSTEAD
        if called := torch_function(sys._getframe(1)):
            what, instead = f"{called} itself reads the value of a tensor", _WITHOUT_CHECKS_INSTEAD
        real = _map_tensors(args, lambda t: self.value(t, what, instead))
        node_args, node_kwargs = self._map(args)[0], self._map(kwargs)[0]
        found = run_real(Tensor.item, real, {}) if func is aten._local_scalar_dense.default else None
        found = run_real(func, real, kwargs) if found is None else found
        self.reads.append(Read(None, func, node_args, node_kwargs, Fixed(self.location(), what, found)))
        return found

    def _record_dynamic(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an op whose shape depends on values, with the shape that the example inputs give."""
        if func is aten.masked_select.default:
            with self:
                return aten.index.Tensor(*_broadcast(*args))
        if func is PICKS and self.branches.every_row and (positions := self._every_position(args[0])) is not None:
            return positions
        what = f"the shape of {func} depends on the value of a tensor"
        node_args, _ = self._map(args)
        node_kwargs, _ = self._map(kwargs)
        real_args, real_kwargs = _map_tensors((args, kwargs), lambda t: self._shaping_value(func, t, what))
        from_values = run_real(func, real_args, real_kwargs)
        out = _map_tensors(from_values, self._fake_like)
        made = self._emit(func, node_args, node_kwargs, out)
        fixed = Fixed(self.location(), what, shapes(from_values), is_shape=True)
        shaping_args, shaping_kwargs = _map_tensors((args, kwargs), lambda t: self._shaping_node(func, t))
        self.reads.append(Read(None, func, shaping_args, shaping_kwargs, fixed))
        return made

    def _every_position(self, mask: Tensor) -> Tensor | None:
        """`nonzero` of a mask that follows from parameters, as if all were picked; None for any other."""
        node = self.node_of(mask)
        if self.picking.is_known(node):
            return None
        with off_the_record(), self.fake_mode:
            every = torch.empty((mask.numel(), mask.dim()), dtype=torch.int64, device="cpu")
        found: Tensor = self._emit(PICKS, (node,), {}, every)
        self.picking.add(self.node_of(found), mask.shape)
        self._note(
            f"{self.location(short=True)}: a mask picks rows by what parameters or chance say: all {mask.numel()} are "
            "computed, those not picked left out, and what runs over those that were hit runs over all"
        )
        return found

    def is_row_number(self, index: Any) -> bool:
        """Whether `index` is the number of one row that a mask picks."""
        is_scalar = isinstance(index, Tensor) and index.dim() == 0
        return is_scalar and self.picking.is_number(self._nodes.get(id(unwrapped(index))))

    def picked(self, tensor: Tensor) -> frozenset[int]:
        """The sizes of `tensor` that are numbers of picked rows."""
        return self.picking.sizes(self._nodes.get(id(unwrapped(tensor))))

    def _shaping_value(self, func: Any, tensor: Tensor, what: str) -> Any:
        """The value of an operand, or zeros where the shape of `func`'s result does not depend on it."""
        if func in _SHAPED_BY_INTEGERS and tensor.is_floating_point():
            with off_the_record():
                return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return self.value(tensor, what, _PICKS_INSTEAD)

    def _shaping_node(self, func: Any, tensor: Tensor) -> Any:
        """The node of an operand, or a meta tensor where the shape of `func`'s result does not depend on its values."""
        if func in _SHAPED_BY_INTEGERS and tensor.is_floating_point():
            with off_the_record():
                return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return self._map(tensor)[0]

    def _fake_like(self, tensor: Tensor) -> Tensor:
        """An unrecorded fake CPU tensor of the same shape, strides and dtype."""
        with off_the_record(), self.fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    def _puts_picked(self, args: tuple[Any, ...]) -> bool:
        """Whether parameters say where a mask has something written to."""
        masks = filter(_is_mask, args[1]) if self.branches.every_row else ()
        return not all(self.picking.is_known(self.node_of(mask)) for mask in masks)

    def _without_masks(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Index arguments with each boolean mask replaced by the positions of its true elements."""
        x, indices, *rest = args
        if not any(map(_is_mask, indices)):
            return args
        plain: list[Any] = []
        for index in indices:
            if _is_mask(index):
                with self:
                    where = aten.nonzero.default(index)
                    plain.extend(aten.select.int(where, 1, i) for i in range(index.dim()))
            else:
                plain.append(index)
        return (x, plain, *rest)

    def location(self, short: bool = False) -> str:
        """The line of the model that is running."""
        file, line = model_line(sys._getframe(1))
        if not file:
            return self._provenance.here().source or "in the model"
        return short_location(file, line) if short else f"{file}:{line}"


def _broadcast(x: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A tensor and a mask of its shape, as arguments of an index."""
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    x, mask = (t if t.shape == shape else aten.expand.default(t, shape) for t in (x, mask))
    return x, [mask]


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _simple(value: Tensor) -> tuple[Any, tuple[Any, ...]] | None:
    """The `full` or `arange` that gives `value`, where there is one."""
    if not 0 < value.numel() <= _MAX_INLINE_ELEMENTS or value.is_complex():
        return None
    flat = value.reshape(-1)
    first = flat[0].item()
    if flat.numel() == 1 or bool((flat == first).all()):
        return aten.full.default, (list(value.shape), first)
    if value.dtype == torch.int64 and value.dim() == 1:
        step = int(flat[1] - flat[0])
        if step and bool((flat.diff() == step).all()):
            return aten.arange.start_step, (int(first), int(first) + step * flat.numel(), step)
    return None


def _map_tensors(value: Any, f: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map_tensors(v, f) for v in value])
    if isinstance(value, dict):
        return {k: _map_tensors(v, f) for k, v in value.items()}
    return value


def _drops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a random op is one: attention without dropout draws nothing."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True


def _random_state() -> bytes:
    return bytes(torch.get_rng_state().numpy().tobytes())


def wrapped(fake: Tensor, requires_grad: bool) -> Tensor:
    """What the model sees of a placeholder: a leaf for autograd that may be written to."""
    out = torch._to_functional_tensor(fake)
    return out.requires_grad_() if requires_grad else out


def unwrapped(tensor: Tensor) -> Tensor:
    """The fake tensor that holds the present value of what the model sees."""
    if not torch._is_functional_tensor(tensor):
        return tensor
    torch._sync(tensor)  # type: ignore[attr-defined]
    return torch._from_functional_tensor(tensor)


def fake_mode() -> FakeTensorMode:
    """The mode that the fake tensors of one capture belong to."""
    return FakeTensorMode(allow_non_fake_inputs=False)
