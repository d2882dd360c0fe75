"""The parity check: a planned step, every rank played in this process, against the unmodified model on one device.

model, inputs -copies with values-> eager step on the whole batch                                 the reference
the same -capture, plan, rewrite-> every rank's program -simulate-> full tensors                  what is checked
where they part -> the captured graph on one device, and the first node at which the ranks leave it
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar import examples, meshes, planning
from autopar.api import skeleton
from autopar.certificate import Kind, Parity, TensorError, Tolerances
from autopar.machine import priced_for
from autopar.mixed import precision_of
from autopar.options import Options, check_options
from autopar.overlaps import check_apart, overlapping
from autopar.unwrapped import check_unwrapped
from autopar.varied import Batch, Variety, real_copy, varied_batch
from costmodel.hardware import Hardware
from passes.autocast import autocast_as, autocast_dtype
from passes.bisect import Divergence, difference, first_divergence, run_program
from passes.double import doubled, in_double
from passes.inputs import path_name
from passes.local import LocalProgram
from passes.named import check_strategy
from passes.pipeline import Manner
from passes.plan import Plan, check_plan
from passes.precision import Precision, default_dtype, dtype_text
from passes.program import Program
from passes.simulate import SimulationError, StepValues, ledger, local_inputs, simulate_step

__all__ = ["Parity", "Tolerances", "verify"]

Progress = Callable[[str], None]

_LEARNING_RATE = 1e-3
_EPS_OF_RMS = 1e-2
"""AdamW's eps as a share of the gradients' root mean square. AdamW divides by a gradient's own size, so that an element
that is zero but for rounding would move by the learning rate whichever way the rounding falls."""
_LOW = (torch.bfloat16, torch.float16)


def verify(
    model: nn.Module,
    mesh: DeviceMesh | Mapping[str, int],
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    strategy: str = "auto",
    options: Options | None = None,
    hardware: str | Hardware | None = None,
    tolerances: Tolerances | None = None,
    progress: Progress = lambda stage: None,
) -> Parity:
    """A certificate that `model`, laid out over `mesh`, computes what it does on one device.

    All ranks are played in this one process on the CPU; no process group, no GPU. Compared are the outputs, every
    gradient, the parameters after a step of AdamW, and the buffers. Where they part, the certificate names the first
    node that differs and the model's line. `plan` is checked where it is given, else one is made under `strategy`.
    The model is left as it is; one on the meta device is given random values in a copy.

    Under `Options(mp_policy=...)` the reference casts parameters, inputs and outputs by hand around the unmodified
    model. In half precision every layout rounds otherwise: a loss may then differ by 2e-2 (relative), any other tensor
    by 5e-2 of its norm, where `tolerances` says nothing else; in float32 by 1e-5 and 1e-4.

    Where the step draws random numbers (dropout), the ranks are held against the captured graph on one device with the
    same seed, and in eval mode against the unmodified model.

    Raises:
        ValueError, CaptureError, NoFeasiblePlanError, PlanMismatchError: as `autopar.plan` and `autopar.apply`.
    """
    check_unwrapped(model)
    check_strategy(strategy)
    options = planning.options_of(plan) if plan is not None else options or Options()
    check_options(options)
    axes = meshes.axes_of(mesh)
    autocast = autocast_dtype()
    with autocast_as(None):
        batch_axes = meshes.batch_axes_of(axes, options.batch_axes)
        if plan is None:
            hardware = priced_for(hardware, mesh)
            planning.machine_of(hardware, axes, batch_axes, options)
        progress("copying the model")
        overlaps = overlapping(model)
        copied, notes = real_copy(model, options.seed)
        call_args, call_kwargs = examples.on_cpu(examples.call_of(model, example_inputs))
        ways = meshes.batch_ranks(axes, batch_axes)
        for batch in _batches(copied, call_args, call_kwargs, ways, options):
            check = _Check(
                copied, batch, axes, batch_axes, options, hardware, strategy, tolerances or Tolerances(), progress,
                autocast,
            )  # fmt: skip
            program = check.captured()
            check_apart(overlaps, program)
            if plan is None or program.fingerprint == plan.fingerprint or program.guards is None:
                break  # else the plan is for a graph that follows from other values
        return check.parity(program, plan, (*notes, *batch.notes))


def _batches(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ways: int, options: Options
) -> Iterator[Batch]:
    """Global batches that the model takes, the one that differs most from rank to rank first."""
    varieties: tuple[Variety, ...] = ("values", "order", "none") if ways > 1 else ("values",)
    for variety in varieties:
        batch = varied_batch(args, kwargs, ways, options.batch_dims, _vocabulary(model), options.seed + 1, variety)
        if variety == varieties[-1] or _takes(model, batch):
            yield batch


def _takes(model: nn.Module, batch: Batch) -> bool:
    """Whether the model's forward runs on a batch."""
    before = _buffers(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(*batch.args, **batch.kwargs)
    except Exception:  # whatever a model raises on inputs that it does not take
        return False
    finally:
        _restore(before)
    return True


def _vocabulary(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


@dataclass(frozen=True)
class _InDouble:
    """Worst errors in float64: of the ranks against the captured graph on one device, and of that against the
    unmodified model; None of what does not run so, or was not tried."""

    ranks: float | None = None
    model: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Check:
    """One call of `verify`; `model` is a copy of our own, with values."""

    model: nn.Module
    batch: Batch
    axes: meshes.Axes
    batch_axes: tuple[int, ...]
    options: Options
    hardware: str | Hardware | None
    strategy: str
    tolerances: Tolerances
    progress: Progress
    autocast: torch.dtype | None
    """What `torch.autocast` around the call computes in."""

    def captured(self) -> Program:
        """The step of the batch."""
        batch = self.batch
        self.progress("capturing the step")
        with autocast_as(self.autocast):
            return planning.captured(
                skeleton(self.model), batch.args, batch.kwargs, batch_dims=batch.batch_dims, batch_size=batch.size,
                precision=self.precision,
            )  # fmt: skip

    def parity(self, program: Program, plan: Plan | None, notes: tuple[str, ...]) -> Parity:
        """Plan, play and compare."""
        model, batch = self.model, self.batch
        if plan is None:
            plan = self._planned(program)
        check_plan(plan, program.fingerprint, self.axes)
        self.progress("writing each rank's program")
        local = planning.rewritten(program, plan)
        values = _Values.of(program, model, batch, self.options.seed)
        random = any(given.kind == "seed" for given in program.inputs)
        self.progress("running the reference")
        reference = self._reference(program, values, random)
        self.progress(f"playing {math.prod(size for _, size in self.axes)} ranks")
        tensors: tuple[TensorError, ...] = ()
        failure, step = "", ""
        try:
            found = simulate_step(
                local, values.parameters, values.buffers, values.inputs, values.tangents, (self.options.seed, 0)
            )
            low = _is_low(program, self.autocast)
            tensors, step = compare(found, reference, values.parameters, self.tolerances, low)
        except SimulationError as error:
            failure = str(error)
        failed = bool(failure) or any(not tensor.ok for tensor in tensors)
        divergence, captured_error = self._explained(local, values, reference, random) if failed else (None, None)
        rounding_error = self._moved_by_rounding(program, values, reference) if failed and not random else None
        double = self._in_double(local, values, random) if failed and not failure else _InDouble()
        without = self._without_randomness(plan) if random and model.training else None
        return Parity(
            model=type(model).__name__,
            parameters=sum(p.numel() for p in model.parameters()),
            dtype=self._dtypes(),
            training=model.training,
            axes=self.axes,
            batch_size=batch.size,
            batch_ranks=meshes.batch_ranks(self.axes, self.batch_axes),
            strategy=plan.strategy,
            hardware=plan.hardware,
            fingerprint=program.fingerprint,
            seed=self.options.seed,
            reference=_CAPTURED if random else _EAGER,
            optimizer=step,
            collectives=dict(Counter(each.kind for each in ledger(local))),
            tensors=tensors,
            divergence=divergence,
            failure=failure,
            captured_error=captured_error,
            rounding_error=rounding_error,
            double_error=double.ranks,
            model_double_error=double.model,
            notes=(*_doubts(reference), *double.notes, *notes, *program.notes),
            without_randomness=without,
        )

    def _reference(self, program: Program, values: _Values, random: bool) -> StepValues:
        """What the step gives on one device: by the model, or by its captured graph where random numbers are drawn.

        Raises:
            ValueError: it cannot be run on these values, which capture has not seen.
        """
        try:
            with autocast_as(None if random else self.autocast):
                if random:
                    return _on_one_device(program, values)
                return eager(self.model, self.batch, program, values.tangents, self.precision)
        except Exception as error:  # whatever a model's ops make of values
            raise ValueError(
                f"{type(self.model).__name__} fails on one device, before any rank is played: {_first_line(error)}; "
                "pass example inputs that it can run on"
            ) from error

    @property
    def precision(self) -> Precision | None:
        """What the options ask the step to compute in."""
        return precision_of(self.options.mp_policy)

    def _dtypes(self) -> str:
        """The parameters', at rest and in compute."""
        found = set()
        for parameter in self.model.parameters():
            dtypes = self.precision.dtypes_of(parameter) if self.precision is not None else None
            computed = f" computed in {dtype_text(dtypes.computed)}" if dtypes is not None else ""
            found.add(dtype_text(parameter.dtype) + computed)
        return ", ".join(sorted(found))

    def _planned(self, program: Program) -> Plan:
        return planning.planned(
            program, self.axes, batch_axes=self.batch_axes, hardware=self.hardware, strategy=self.strategy,
            options=self.options, example="", manner=Manner(self.progress),
        )  # fmt: skip

    def _explained(
        self, local: LocalProgram, values: _Values, reference: StepValues, random: bool
    ) -> tuple[Divergence | None, float | None]:
        """Where the ranks leave the captured graph, and how far that is from the reference."""
        self.progress("looking for the first node that differs")
        seed = (self.options.seed, 0)
        per_rank = local_inputs(local, values.parameters, values.buffers, values.inputs, values.tangents, seed)
        low = _is_low(local.program, self.autocast)
        limit, _ = _limits(self.tolerances, low)
        found = first_divergence(local, per_rank, values.placeholders, limit)
        if random:
            return found, None
        alone = _on_one_device(local.program, values)
        tensors, _ = compare(alone, reference, values.parameters, self.tolerances, low)
        return found, max((tensor.error for tensor in tensors), default=0.0)

    def _moved_by_rounding(self, program: Program, values: _Values, reference: StepValues) -> float:
        """How far the reference moves where each of its parameters is moved by a rounding, up or down."""
        self.progress("moving the reference by a rounding")
        low = _is_low(program, self.autocast)
        random = torch.Generator().manual_seed(self.options.seed)
        before = [(parameter, parameter.detach().clone()) for parameter in self.model.parameters()]
        try:
            with torch.no_grad():
                for parameter, _ in before:
                    signs = torch.randint(0, 2, parameter.shape, generator=random) * 2 - 1
                    parameter.add_((parameter * signs * _eps(low)).to(parameter.dtype))
            moved = self._reference(program, values, random=False)
        finally:
            for parameter, old in before:
                parameter.data.copy_(old)
        tensors, _ = compare(moved, reference, values.parameters, self.tolerances, low)
        return max((tensor.error for tensor in tensors), default=0.0)

    def _in_double(self, local: LocalProgram, values: _Values, random: bool) -> _InDouble:
        """The check in float64, where rounding all but vanishes."""
        if _is_low(local.program, self.autocast):
            return _InDouble()
        self.progress("again in float64")
        wide, held = in_double(local), values.doubled()
        tolerances = self.tolerances

        def worst(found: StepValues, wanted: StepValues) -> float:
            return max((tensor.error for tensor in compare(found, wanted, held.parameters, tolerances)[0]), default=0.0)

        seed = (self.options.seed, 0)
        ranks = model = None
        try:
            with default_dtype(torch.float64):
                alone = _on_one_device(wide.program, held)
                found = simulate_step(wide, held.parameters, held.buffers, held.inputs, held.tangents, seed)
                ranks = worst(found, alone)
                if not random:
                    args, kwargs = doubled((self.batch.args, self.batch.kwargs))
                    batch, (twin, _) = (
                        replace(self.batch, args=args, kwargs=kwargs),
                        real_copy(self.model, self.options.seed),
                    )
                    model = worst(alone, eager(twin.double(), batch, wide.program, held.tangents))
        except Exception as error:  # an op or a model that takes no float64
            what = "the ranks' programs do" if ranks is None else "the model does"
            return _InDouble(ranks, model, (f"{what} not run in float64: {_first_line(error)}",))
        return _InDouble(ranks, model)

    def _without_randomness(self, plan: Plan) -> Parity:
        self.progress("again in eval mode")
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        again = _Check(
            self.model, self.batch, self.axes, self.batch_axes, self.options, planning.topology_of(plan).hardware,
            plan.strategy, self.tolerances, self.progress, self.autocast,
        )  # fmt: skip
        try:
            return again.parity(again.captured(), None, ())
        finally:
            for module, training in modes:
                module.training = training


_EAGER = "the unmodified model run eagerly on the whole batch"
_CAPTURED = (
    "the captured graph run on one device with the same seed: the step draws random numbers, and eager's are its own"
)


# -- a step on one device ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Values:
    """Full tensors for everything a program takes; `placeholders` has them in its order."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    inputs: list[Tensor]
    tangents: list[Tensor]
    placeholders: list[Tensor]

    @staticmethod
    def of(program: Program, model: nn.Module, batch: Batch, seed: int) -> _Values:
        """Parameters and buffers as they are now, copied; tangents are 1 for a loss, else random."""
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        random = torch.Generator().manual_seed(seed)
        parameters: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        tangents, placeholders = [], []
        inputs = iter(batch.tensors)
        nodes = program.graph.graph.find_nodes(op="placeholder")
        for node, given in zip(nodes, program.inputs, strict=True):
            fake = node.meta["val"]
            if given.kind in ("parameter", "buffer"):
                value = tensors[given.name].detach().clone()
                computed = value.to(fake.dtype)
                (parameters if given.kind == "parameter" else buffers)[given.name] = value
            elif given.kind == "input":
                value = next(inputs).detach()
            elif given.kind == "tangent":
                shape = tuple(int(n) for n in fake.shape)
                value = torch.ones(shape) if not shape else torch.randn(shape, generator=random) / math.prod(shape)
                value = value.to(fake.dtype)
                tangents.append(value)
            else:
                value = torch.tensor([seed, 0], dtype=torch.int64)
            placeholders.append(computed if given.kind == "parameter" else value)
        return _Values(parameters, buffers, batch.tensors, tangents, placeholders)

    def doubled(self) -> _Values:
        """The same in float64."""
        return _Values(**{field.name: doubled(getattr(self, field.name)) for field in fields(self)})


def _on_one_device(program: Program, values: _Values) -> StepValues:
    """The captured graph's step."""
    found = StepValues({}, {}, {})
    kinds = {"output": found.outputs, "buffer": found.buffers, "gradient": found.gradients}
    for described, value in zip(program.outputs, run_program(program, values.placeholders), strict=True):
        kinds[described.kind][described.name] = value
    return found


def eager(
    model: nn.Module, batch: Batch, program: Program, tangents: list[Tensor], precision: Precision | None = None
) -> StepValues:
    """The unmodified model's step on the whole batch, on a model of our own: its buffers change as in training.

    Under `precision`, what is cast is cast by autograd's own ops around the model.

    Outputs and gradients have the names that `program` gives them.
    """
    tensors = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    model.zero_grad()
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (batch.args, batch.kwargs)
    )
    expected = {out.name for out in program.outputs if out.kind == "buffer"}
    before = _buffers(model, expected)
    differentiated = [given.name for given in program.inputs if given.kind == "tangent"]
    with warnings.catch_warnings(), torch.set_grad_enabled(bool(differentiated)):
        warnings.simplefilter("ignore")
        outputs = _named_outputs(_forward(model, args, kwargs, precision))
    if differentiated:
        with autocast_as(None):
            torch.autograd.backward([outputs[name] for name in differentiated], tangents)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    given = dict(zip((x.name for x in program.inputs if x.kind == "input"), leaves, strict=True))
    gradients = {name: tensor.grad.detach() for name, tensor in (tensors | given).items() if tensor.grad is not None}
    known = {given.name for given in program.inputs if given.kind == "buffer"}
    buffers = {
        name: table[key].detach().clone()
        for name, (table, key, _, old) in before.items()
        if name in expected or (name in known and difference(table[key], old) > 0)
    }
    _restore(before)
    first = {name for name, _ in model.named_parameters()} | set(given)
    return StepValues(
        {name: value.detach() for name, value in outputs.items()},
        buffers,
        {name: value for name, value in gradients.items() if name in first},
    )


def _forward(model: nn.Module, args: Any, kwargs: Any, precision: Precision | None) -> Any:
    """What the model returns; under `precision`, on cast parameters and inputs."""
    if precision is None:
        return model(*args, **kwargs)
    dtypes = {name: precision.dtypes_of(parameter) for name, parameter in model.named_parameters()}
    cast = {name: p.to(of.computed) for name, p in model.named_parameters() if (of := dtypes[name]) is not None}
    args, kwargs = pytree.tree_map(precision.cast_input, (args, kwargs))
    out = torch.func.functional_call(model, cast, args, kwargs, tie_weights=True)
    return pytree.tree_map(precision.cast_output, out)


def _buffers(model: nn.Module, written: Collection[str] = ()) -> dict[str, tuple[dict[str, Any], str, Tensor, Tensor]]:
    """Name -> where a buffer hangs, the tensor, and its values: a forward may write to it or put another there.

    written: names of parameters to have among them.
    """
    found: dict[str, tuple[dict[str, Any], str, Tensor, Tensor]] = {}
    for prefix, module in model.named_modules():
        tables: tuple[dict[str, Any], ...] = (module._buffers, module._parameters)
        for table in tables:
            for key, tensor in table.items():
                name = f"{prefix}.{key}" if prefix else key
                if tensor is not None and (table is module._buffers or name in written):
                    found[name] = table, key, tensor, tensor.detach().clone()
    return found


def _restore(before: dict[str, tuple[dict[str, Any], str, Tensor, Tensor]]) -> None:
    for table, key, tensor, old in before.values():
        table[key] = tensor
        tensor.data.copy_(old)


def _named_outputs(out: Any) -> dict[str, Tensor]:
    try:
        named = [(path_name(path), leaf) for path, leaf in pytree.tree_flatten_with_path(out)[0]]
    except (ValueError, NotImplementedError):  # a container that does not name its parts
        named = [(str(i), leaf) for i, leaf in enumerate(pytree.tree_leaves(out))]
    return {name: leaf for name, leaf in named if isinstance(leaf, Tensor)}


# -- comparing ---------------------------------------------------------------------------------------------------------


def _first_line(error: Exception) -> str:
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def _doubts(reference: StepValues) -> tuple[str, ...]:
    """What makes a certificate say less than it seems to."""
    if reference.gradients and not any(bool(gradient.any()) for gradient in reference.gradients.values()):
        return (
            "every gradient of the reference is zero, which proves nothing about them; give other inputs or weights",
        )
    return ()


def _is_low(program: Program, autocast: torch.dtype | None) -> bool:
    """Whether the step computes in half precision, by its parameters or under autocast."""
    nodes = program.graph.graph.find_nodes(op="placeholder")
    given = zip(nodes, program.inputs, strict=True)
    return autocast in _LOW or any(node.meta["val"].dtype in _LOW for node, what in given if what.kind == "parameter")


def _eps(low: bool) -> float:
    """A rounding, relative; `low`: in half precision."""
    return 2.0**-8 if low else 2.0**-23


def _limits(tolerances: Tolerances, low: bool) -> tuple[float, float]:
    """(of scalar outputs, of all other tensors)."""
    loss, gradient = (2e-2, 5e-2) if low else (1e-5, 1e-4)
    return (
        loss if tolerances.loss is None else tolerances.loss,
        gradient if tolerances.gradient is None else tolerances.gradient,
    )


def compare(
    found: StepValues, wanted: StepValues, parameters: Mapping[str, Tensor], tolerances: Tolerances, low: bool = False
) -> tuple[tuple[TensorError, ...], str]:
    """Every tensor's error, and what the optimizer's step was; `low`: where half precision rounded."""
    of_loss, of_rest = _limits(tolerances, low)

    def floor_of(norm: float) -> float:
        return _eps(low) * norm / of_rest if of_rest else 0.0

    total = _norm(wanted.gradients.values())
    errors = []
    for name, value in found.outputs.items():
        limit = of_loss if not value.dim() else of_rest
        errors.append(_error("output", name, value, wanted.outputs.get(name), limit))
    for name in dict.fromkeys([*wanted.gradients, *found.gradients]):
        pair = found.gradients.get(name), wanted.gradients.get(name)
        errors.append(_error("gradient", name, *pair, of_rest, floor=floor_of(total)))
    for name in dict.fromkeys([*wanted.buffers, *found.buffers]):
        pair = found.buffers.get(name), wanted.buffers.get(name)
        errors.append(_error("buffer", name, *pair, of_rest, floor=floor_of(_norm(_beside(name, wanted.buffers)))))
    trained = {n: p for n, p in parameters.items() if n in wanted.gradients and n in found.gradients}
    if not trained or not total:
        return tuple(errors), ""
    count = sum(wanted.gradients[name].numel() for name in trained)
    step_eps = max(1e-8, _EPS_OF_RMS * total / math.sqrt(count))
    after = [_stepped(trained, values.gradients, step_eps) for values in (found, wanted)]
    for name, tensor in trained.items():
        floor = _LEARNING_RATE * math.sqrt(tensor.numel())
        errors.append(_error("parameter", name, after[0][name], after[1][name], of_rest, floor=floor))
    return tuple(errors), f"AdamW, lr {_LEARNING_RATE:g}, eps {step_eps:.1e} ({_EPS_OF_RMS:.0%} of the gradients' rms)"


def _norm(tensors: Iterable[Tensor]) -> float:
    """Of all of them as one vector."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _beside(name: str, buffers: Mapping[str, Tensor]) -> list[Tensor]:
    """The statistics that a module keeps of the same values, the buffer's own among them: a running mean that is zero
    but for rounding has the scale of the variance."""
    own, module = buffers.get(name), name.rpartition(".")[0]
    if own is None or not own.is_floating_point():
        return []
    return [
        value
        for other, value in buffers.items()
        if other.rpartition(".")[0] == module
        and (value.shape, value.dtype) == (own.shape, own.dtype)
        and bool(value.isfinite().all())
    ]


def _error(
    kind: Kind, name: str, found: Tensor | None, wanted: Tensor | None, tolerance: float, floor: float = 0.0
) -> TensorError:
    one = found if found is not None else wanted
    assert one is not None
    shape = tuple(one.shape)
    if found is None or wanted is None:
        missing = "the ranks" if found is None else "the unmodified model"
        return TensorError(kind, name, shape, math.inf, tolerance, f"{missing} gave none")
    if found.shape != wanted.shape:
        return TensorError(kind, name, shape, math.inf, tolerance, f"the reference has shape {list(wanted.shape)}")
    if wanted.dtype.is_floating_point and bool(wanted.isnan().any()):
        return TensorError(kind, name, shape, math.nan, tolerance, "the reference holds NaNs, which prove nothing")
    scale = float(torch.where(wanted.isfinite(), wanted, torch.zeros_like(wanted)).double().norm())
    error = difference(found, wanted)
    if floor > scale:
        note = "" if kind == "parameter" else "zero but for rounding"
        return TensorError(kind, name, shape, error * (scale or 1.0) / floor, tolerance, note)
    return TensorError(kind, name, shape, error, tolerance)


def _stepped(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """The parameters after a step of AdamW."""
    stepped = {name: nn.Parameter(tensor.clone()) for name, tensor in parameters.items()}
    for name, parameter in stepped.items():
        parameter.grad = gradients[name].detach().to(parameter.dtype).clone()
    torch.optim.AdamW(stepped.values(), lr=_LEARNING_RATE, eps=eps).step()
    return {name: parameter.detach() for name, parameter in stepped.items()}
