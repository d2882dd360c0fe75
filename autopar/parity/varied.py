"""A global batch whose ranks bring different values, and values for models that have none.

A check on a batch that is the same on every rank would miss a gradient that is not averaged. So each further rank gets
the example's own values in another order: along the last dim, alike in all inputs of that length (ids stay with their
labels). And since a model without positions may not see order, the values of integer inputs (which are ids of
something) are exchanged for one another too: every 7 becomes a 12. Masks and positions stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from autopar.modules import tree
from passes.capture.inputs import flatten_inputs, global_inputs
from passes.capture.rebind import rebind, tensors_beside

_TOKENS = frozenset({"input_ids", "decoder_input_ids", "labels"})


Variety = Literal["values", "order", "none"]
"""How ranks differ: in values and their order, in order alone (counts of an id may matter), or not at all."""


@dataclass(frozen=True)
class Batch:
    """The global batch, with real values."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    batch_dims: tuple[int | None, ...]
    names: tuple[str, ...]
    """Of the leaves: `args.0`, `input_ids`."""
    notes: tuple[str, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


def varied_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], ways: int, batch_dims: Any, vocabulary: int | None, seed: int,
    variety: Variety = "values",
) -> Batch:  # fmt: skip
    """The batch of `ways` ranks that each feed values like `(args, kwargs)`, but different ones.

    Meta tensors get values: token ids below `vocabulary`, ones for masks, zeros for other integers, normal numbers.
    """
    whole = global_inputs(args, kwargs, ways, batch_dims)
    leaves, spec, names = flatten_inputs(args, kwargs)
    random = torch.Generator().manual_seed(seed)
    notes = list(whole.notes)
    own = [
        _with_values(name, leaf, vocabulary, random) if isinstance(leaf, Tensor) else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
        notes.append("the example inputs hold no values: drawn at random")
    ranks = [own, *(_shuffled(own, whole.batch_dims, random, variety) for _ in range(ways - 1))]
    made = [
        torch.cat([rank[i] for rank in ranks], dim) if dim is not None else leaf
        for i, (leaf, dim) in enumerate(zip(own, whole.batch_dims, strict=True))
    ]
    made = [
        new.detach().requires_grad_(old.requires_grad) if isinstance(old, Tensor) else new
        for new, old in zip(made, leaves, strict=True)
    ]
    split = [i for i, dim in enumerate(whole.batch_dims) if dim is not None]
    if ways > 1 and not any(_differ([rank[i] for rank in ranks]) for i in split):
        notes.append(
            "the batch is the same on every data-parallel rank, so a missing average over ranks would not show; pass "
            "example inputs with different values"
        )
    new_args, new_kwargs = pytree.tree_unflatten(made, spec)
    return Batch(new_args, new_kwargs, whole.batch_size, whole.batch_dims, tuple(names), tuple(notes))


def _differ(values: list[Any]) -> bool:
    return any(not torch.equal(values[0], other) for other in values[1:])


def _with_values(name: str, leaf: Tensor, vocabulary: int | None, random: torch.Generator) -> Tensor:
    token = name.rpartition(".")[2] in _TOKENS and not leaf.dtype.is_floating_point and leaf.dim() == 2
    alike = not leaf.is_meta and leaf.numel() > 1 and bool((leaf == leaf.flatten()[0]).all())
    if token and vocabulary and (leaf.is_meta or alike):
        return torch.randint(0, vocabulary, leaf.shape, generator=random).to(leaf.dtype)
    if not leaf.is_meta:
        return leaf.detach()
    if leaf.dtype.is_floating_point:
        return torch.randn(leaf.shape, generator=random).to(leaf.dtype)
    return torch.ones(leaf.shape, dtype=leaf.dtype) if "mask" in name else torch.zeros(leaf.shape, dtype=leaf.dtype)


def _shuffled(own: list[Any], dims: tuple[int | None, ...], random: torch.Generator, variety: Variety) -> list[Any]:
    orders: dict[int, Tensor] = {}
    exchanges: dict[tuple[int, ...], Tensor] = {}
    found = []
    for leaf, dim in zip(own, dims, strict=True):
        if variety == "none" or dim is None or leaf.dim() < 2 or dim == leaf.dim() - 1 or _ordered(leaf):
            found.append(leaf)
            continue
        length = leaf.shape[-1]
        if length not in orders:
            orders[length] = torch.randperm(length, generator=random)
        moved = leaf[..., orders[length]]
        found.append(_exchanged(moved, exchanges, random) if variety == "values" else moved)
    return found


def _exchanged(leaf: Tensor, exchanges: dict[tuple[int, ...], Tensor], random: torch.Generator) -> Tensor:
    """The values of an integer tensor exchanged for one another, alike in tensors that hold the same; negative ones
    (labels to be ignored) stay."""
    if leaf.dtype.is_floating_point or leaf.dtype.is_complex:
        return leaf
    values = leaf[leaf >= 0].unique()
    key = tuple(values.tolist())
    if key not in exchanges:
        exchanges[key] = values[torch.randperm(len(values), generator=random)]
    new = exchanges[key][torch.searchsorted(values, leaf.clamp(min=0)).clamp(max=max(0, len(values) - 1))]
    return torch.where(leaf >= 0, new, leaf) if len(values) else leaf


def _ordered(leaf: Tensor) -> bool:
    """Whether a tensor's rows go only up or only down (positions, segments, padding masks), or it is a mask."""
    if leaf.dtype.is_floating_point:
        return False
    if leaf.dtype == torch.bool or bool(((leaf == 0) | (leaf == 1)).all()):
        return True
    steps = leaf.diff(dim=-1)
    return bool((steps >= 0).all() or (steps <= 0).all()) and bool(steps.any())


# -- models ------------------------------------------------------------------------------------------------------------


def real_copy(model: nn.Module, seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of `model` on the CPU that shares no tensor with it, and notes; what was on the meta device has values."""
    if not any(tensor.is_meta for _, tensor in _tensors(model)):
        memo: dict[int, Any] = {}
        # `deepcopy` gives a parameter memory of its own, and takes nothing that autograd made.
        for weight in model.parameters():
            if type(weight) is nn.Parameter:
                memo[id(weight)] = nn.Parameter(copy.deepcopy(weight.detach(), memo), weight.requires_grad)
        for tensor in tensors_beside(model):
            if not tensor.is_leaf:
                memo[id(tensor)] = copy.deepcopy(tensor.detach(), memo).requires_grad_()
        copied = copy.deepcopy(model, memo).cpu()
        rebind(copied, {key: new for key, new in memo.items() if isinstance(new, (nn.Module, Tensor))})
        copied.zero_grad()
        return copied, ()
    invented: list[str] = []

    def made(name: str, old: Tensor) -> Tensor:
        if not old.is_meta:
            return old.detach().to("cpu", copy=True)
        invented.append(name)
        return torch.zeros(old.shape, dtype=old.dtype)

    def parameter(name: str, old: nn.Parameter) -> nn.Parameter:
        new = nn.Parameter(made(name, old), requires_grad=old.requires_grad)
        new.__dict__.update((key, value) for key, value in old.__dict__.items() if key != "_is_hf_initialized")
        return new

    copied = tree.copied(model, parameter, made)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _fill(copied, frozenset(invented))
    return copied, (f"{len(invented)} tensors of the model are on the meta device: random values stand for them",)


def _fill(model: nn.Module, names: frozenset[str]) -> None:
    """Values for the tensors called `names`: by the model's own initialisation where it has one."""
    before = {name: tensor.detach().clone() for name, tensor in _tensors(model) if name not in names}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in names:
                weight.normal_(std=0.02)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        _initialise(model)
        for name, tensor in _tensors(model):
            if name in before:
                tensor.copy_(before[name])
            elif tensor.dtype.is_floating_point and tensor.dim() == 1 and not tensor.any() and "bias" not in name:
                tensor.fill_(1.0)


def _initialise(model: nn.Module) -> None:
    """What Hugging Face's models do to start training: parameters, and buffers that no checkpoint holds."""
    init: Callable[[nn.Module], Any] | None = getattr(model, "_init_weights", None)
    if not callable(init):
        return
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
        init(module)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
