"""What a parallel module knows beside its tensors."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.modules import hooks, tree
from autopar.modules.batches import BatchRanks
from autopar.modules.reading import Gather, Seen
from passes.capture.differentiated import Tangents
from passes.lower.lower import Lowered, Unreduced
from passes.program.local import LocalProgram, Storage

OWN_FORWARD = "_autopar_own_forward"
"""Where a parallel module keeps a forward that its model had beside its class's."""


@dataclass(frozen=True)
class Executable:
    """One rank's step for one kind of call."""

    local: LocalProgram
    lowered: Lowered


Remake = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Tangents, bool], Executable]
"""(plain module on the meta device, args, kwargs, tangents, whether gradients are wanted) -> what runs such calls."""


@dataclass
class Runtime:
    """What the parallel module knows beside its tensors.

    `syncs`: whether a backward exchanges gradients; `unreduced`: what backwards that did not have left, by program.

    `specs`: how each parameter is stored, by the first of its names. `batch`: who has which part of the batch;
    `accelerated`: whether our `Accelerator` has prepared the module; `accelerating`: whether it is about to.
    `steps` counts training calls, for random ops. `executables` has, per kind of call, one for each kind of values
    that the model reads of its modules and inputs, the last used first. `gather` makes inputs whole; None: they are.
    `of_arrived`: executables with a backward of some of their outputs, by these.
    `bindings`, `settings` and `checked`: what `binding.binding_of`, `settings.hold` and `parameters.checked` found out
    that holds for the next call too. `seen` has buffers that are read as numbers, and `held`, by program, as they were
    when it was found to fit.
    """

    mesh: DeviceMesh
    batch: BatchRanks
    storages: Mapping[str, Storage]
    specs: Mapping[str, Any]
    aliases: Mapping[str, str]
    slots: Mapping[str, tree.Slot]
    modules: Sequence[nn.Module]
    children: tree.Children
    original: type[nn.Module]
    remake: Remake
    seed: int = 0
    steps: int = 0
    gather: Gather | None = None
    syncs: bool = True
    unreduced: dict[int, tuple[Executable, Unreduced, list[torch.dtype]]] = field(default_factory=dict)
    executables: dict[Any, list[Executable]] = field(default_factory=dict)
    with_all: dict[int, Executable] = field(default_factory=dict)
    of_arrived: dict[tuple[int, frozenset[str]], Executable] = field(default_factory=dict)
    bindings: dict[int, tuple[Executable, Any]] = field(default_factory=dict)
    settings: dict[int, Any] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)
    held: dict[int, list[Seen]] = field(default_factory=dict)
    checked: Any = None
    accelerated: bool = False
    accelerating: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """For a copy of the module, which runs the same programs: they are known by who they are.

        It has no gradients, so none that were held back either.
        """
        return replace(
            self,
            slots=copy.deepcopy(self.slots, memo),
            modules=copy.deepcopy(self.modules, memo),
            children=copy.deepcopy(self.children, memo),
            executables={key: list(known) for key, known in self.executables.items()},
            with_all=dict(self.with_all),
            of_arrived=dict(self.of_arrived),
            bindings=dict(self.bindings),
            unreduced={},
            settings={},
            seen={},
            held={},
            checked=None,
        )

    @functools.cached_property
    def parameter_slots(self) -> tuple[tree.Slot, ...]:
        """Per parameter, in the order of `specs`: the module table and key that hold it."""
        return tuple(self.slots[name] for name in self.specs)

    @functools.cached_property
    def buffer_slots(self) -> tuple[tree.Slot, ...]:
        """Per buffer: the module table and key that hold it."""
        return tuple((module._buffers, key) for module in self.modules for key in module._buffers)

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """Ranks per mesh axis."""
        return tuple(self.mesh.shape)

    @property
    def coordinate(self) -> tuple[int, ...]:
        """This rank's index on each mesh axis."""
        return tuple(self.mesh.get_coordinate() or ())


def runtime_of(module: nn.Module) -> Runtime:
    """What a parallel module knows beside its tensors."""
    return cast(Runtime, module.__dict__["_autopar"])


def device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def has_gradients(local: LocalProgram) -> bool:
    return any(output.kind == "gradient" for output in local.outputs)


def plain_module(
    module: nn.Module, trained: Sequence[bool], buffers: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> nn.Module:
    """The model of a parallel module as it was before: its own class, whole parameters on the meta device.

    trained: which parameters require gradients, in the order of `Runtime.specs`. buffers: those that are to be others
    than the module's, by name.
    """
    runtime = runtime_of(module)
    requires = dict(zip(runtime.specs, trained, strict=True))

    def parameter(name: str, old: nn.Parameter) -> nn.Parameter:
        whole = torch.empty(runtime.specs[name].shape, dtype=old.dtype, device="meta")
        new = nn.Parameter(whole, requires_grad=requires[name])
        new.__dict__.update(old.__dict__)
        return new

    plain = tree.copied(module, parameter, lambda name, old: buffers.get(name, old))
    plain.__class__ = runtime.original
    del plain.__dict__["_autopar"]
    plain.__dict__.pop("forward", None)  # what was put around the parallel module's (accelerate's autocast)
    if OWN_FORWARD in plain.__dict__:
        plain.__dict__["forward"] = plain.__dict__.pop(OWN_FORWARD)
    hooks.put_back(plain)
    return plain
