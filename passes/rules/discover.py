"""A rule for an op that no table knows, found by running the op on shards.

The op is tried on small tensors of random values: dims of equal size are split together, and where the results of the
parts, put end to end, added up or taken the maximum of, are the result of the whole, these dims are a factor. Every
factor is tried again on other sizes, other values and other numbers of parts, down to parts of one entry. Arguments
are passed as they are: where one holds a size, the parts come out wrong and no factor is found.

Nothing is tried of an op that is random, writes to its arguments, or gives results whose shape depends on values. The
trials run in a child process: kernels that trust their caller's shapes may crash on parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from string import ascii_letters
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from passes.rules.call import Call, Operand, TensorFacts
from passes.rules.form import Dims, Form, FormBuilder
from passes.rules.in_child import in_child
from passes.rules.table import whole_form

Together = int | Literal["sum", "max"]
"""How results of parts recombine: end to end along a dim, or by a reduction."""

_STAND_INS = (
    (6, 4, 9, 8, 12, 16, 18, 24),
    (10, 15, 5, 20, 25, 30, 35, 40),
    (14, 21, 7, 28, 35, 42, 49, 56),
)
"""Sizes tried, one list per round: parts have 2, 3, 5 or 7 entries, or a single one."""
_MOST_ELEMENTS = 2**22
_MOST_CANDIDATES = 600
_LONGEST_S = 20.0
_POSITIONS = {"dim", "dims", "axis", "axes", "dim0", "dim1", "dim2", "start_dim", "end_dim"}
"""Arguments whose integers count dims, not entries."""
_NEVER = (
    torch.Tag.nondeterministic_seeded,
    torch.Tag.dynamic_output_shape,
    torch.Tag.data_dependent_output,
    torch.Tag.inplace_view,
)


@dataclass(frozen=True)
class Discovery:
    """The form of an op as execution shows it, a line for the report, and the rule as text ("" where it is whole)."""

    form: Form
    line: str
    rule: str


@dataclass(frozen=True)
class _Factor:
    """Dims that are split together (one per operand, None where it has no part in it), and how results recombine."""

    dims: tuple[int | None, ...]
    together: tuple[Together, ...]


class _RefusedError(Exception):
    """Why an op is not tried, or what went wrong."""


_found: dict[str, Discovery] = {}


def discover(call: Call) -> Discovery:
    """What the op allows to be split, by trying; the whole form where nothing does. Equal calls are tried once."""
    key = str(call)
    if key not in _found:
        try:
            factors = in_child(lambda: _factors(call), _RefusedError, _LONGEST_S)
            if not factors:
                raise _RefusedError("no split of its operands gives parts of its results")
            rule = _rule(call, factors)
            line = f"{call.target}: no rule; found by running it on shards: {rule}"
            _found[key] = Discovery(form_of_rule(call, rule), line, rule)
        except _RefusedError as refusal:
            line = f"{call.target}: no rule; runs whole on every rank: {refusal}"
            _found[key] = Discovery(whole_form(call), line, "")
    return _found[key]


def _rule(call: Call, factors: Sequence[_Factor]) -> str:
    """The factors as text: `ab_,a->ab_ (a by sum)`, a letter per factor; `_` is a dim that is whole."""
    operands = [["_"] * len(facts.shape) for facts in call.operands]
    results = [["_"] * len(facts.shape) if facts else [] for facts in call.results]
    reduced = []
    for letter, factor in zip(ascii_letters, factors, strict=False):
        for dims, d in zip(operands, factor.dims, strict=True):
            if d is not None:
                dims[d] = letter
        for dims, t in zip(results, factor.together, strict=True):
            if isinstance(t, int):
                dims[t] = letter
            elif f"{letter} by {t}" not in reduced:
                reduced.append(f"{letter} by {t}")
    text = "->".join(",".join("".join(dims) for dims in tensors) for tensors in (operands, results))
    return text + (f" ({', '.join(reduced)})" if reduced else "")


def form_of_rule(call: Call, rule: str) -> Form:
    """The form of a call that `rule` (as a `Discovery` has it) describes; the whole form where it is empty."""
    if not rule:
        return whole_form(call)
    equation, _, reduced = rule.partition(" (")
    left, right = equation.split("->")
    reduces = dict(part.split(" by ") for part in reduced.rstrip(")").split(", ") if part)
    build = FormBuilder()
    made: dict[str, tuple[int, ...]] = {}

    def dims(letters: str, shape: Sequence[int]) -> Dims:
        for letter, size in zip(letters, shape, strict=True):
            if letter != "_" and letter not in made:
                made[letter] = build.factor(size, reduce=reduces.get(letter))
        return tuple(made[x] if x != "_" else build.factor(n, whole=True) for x, n in zip(letters, shape, strict=True))

    operands = [dims(x, facts.shape) for x, facts in zip(left.split(","), call.operands, strict=True)]
    results = [dims(x, facts.shape) if facts else () for x, facts in zip(right.split(","), call.results, strict=True)]
    return build.form(operands, results)


# ---------------------------------------------------------------------------------------------------- a process apart
# ------------------------------------------------------------------------------------------------------------- trying
def _refusal(call: Call) -> str | None:
    schema = getattr(call.target, "_schema", None)
    tags = getattr(call.target, "tags", ())
    if schema is None:
        return "it is no operator with a schema"
    if schema.is_mutable:
        return "it writes to its arguments"
    if any(tag in tags for tag in _NEVER):
        return "it is random, or its result's shape depends on values"
    if not call.operands:
        return "it has no tensor arguments"
    if not call.results or any(facts is None for facts in call.results):
        return "some of its results are no tensors"
    return None


def _holds_sizes(call: Call) -> bool:
    """Whether an argument holds integers that may be counts of entries."""
    sizes = False

    def look(value: Any) -> None:
        nonlocal sizes
        if isinstance(value, list | tuple):
            for item in value:
                look(item)
        elif isinstance(value, int) and not isinstance(value, bool):
            sizes = True

    for name, value in call.arguments.items():
        if name not in _POSITIONS:
            look(value)
    return sizes


Shapes = tuple[tuple[int, ...], ...]


def _real(call: Call) -> Shapes:
    return tuple(facts.shape for facts in call.operands)


def _stand_ins(call: Call, sizes: Sequence[int], rotate: int) -> Shapes:
    """Small shapes in which equal sizes are equal, `rotate` deciding which stands for which."""
    real = sorted({n for shape in _real(call) for n in shape if n > 1})
    if len(real) > len(sizes):
        raise _RefusedError(f"its tensors have {len(real)} distinct sizes, too many to try")
    small = {n: sizes[(i + rotate) % len(real)] for i, n in enumerate(real)}
    return tuple(tuple(small.get(n, n) for n in shape) for shape in _real(call))


def _factors(call: Call) -> tuple[_Factor, ...]:
    refusal = _refusal(call)
    if refusal is not None:
        raise _RefusedError(refusal)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if not _holds_sizes(call):
            tried = [_stand_ins(call, sizes, rotate) for rotate, sizes in enumerate(_STAND_INS)]
            if all(_runs(call, shapes) for shapes in tried):
                return _search(call, tried)
        if sum(math.prod(shape) for shape in _real(call)) > _MOST_ELEMENTS:
            raise _RefusedError("its arguments hold sizes, and its tensors are too large to try")
        if not _runs(call, _real(call)):
            raise _RefusedError("it does not run on random values")
        return _search(call, [_real(call)])


def _search(call: Call, tried: Sequence[Shapes]) -> tuple[_Factor, ...]:
    trials = [_Trial(call, shapes, values) for shapes in tried for values in range(len(_VALUES))]
    trials = [trial for trial in trials if trial.wholes is not None]
    accepted: list[_Factor] = []
    for dims in _candidates(call):
        taken = {(k, d) for factor in accepted for k, d in enumerate(factor.dims) if d is not None}
        if any((k, d) in taken for k, d in enumerate(dims) if d is not None):
            continue
        together = _recombination(call, dims, trials)
        if together is None:
            continue
        made = {(r, t) for factor in accepted for r, t in enumerate(factor.together) if isinstance(t, int)}
        if not any((r, t) in made for r, t in enumerate(together)):
            accepted.append(_Factor(dims, together))
    return tuple(accepted)


def _candidates(call: Call) -> Iterator[tuple[int | None, ...]]:
    """Dims of equal size, at most one per operand; those of more operands first.

    Operands of integers take part in every split: they may hold positions in what is split, and random ones say
    little.
    """
    shapes = _real(call)
    integers = {k for k, facts in enumerate(call.operands) if _is_integer(facts.dtype)}
    found: list[tuple[int | None, ...]] = []
    for size in sorted({n for shape in shapes for n in shape if n > 1}):
        choices = [[d for d, n in enumerate(shape) if n == size] for shape in shapes]
        if len(found) + math.prod(len(dims) + 1 for dims in choices) > _MOST_CANDIDATES:
            raise _RefusedError("it has too many tensor arguments to try")
        found += [
            dims
            for dims in product(*([None, *dims] for dims in choices))
            if any(d is not None for d in dims) and all(dims[k] is not None for k in integers)
        ]
    yield from sorted(found, key=lambda dims: -sum(d is not None for d in dims))


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


# -------------------------------------------------------------------------------------------------------------- values
_VALUES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: 30 * x,
    lambda x: x.abs() + 0.1,
    lambda x: x.tanh() / 2 + 0.5,
)
"""Numbers to try: around 0, large ones, positive ones, and probabilities."""


def _tensor(facts: TensorFacts, shape: Sequence[int], values: int, generator: torch.Generator) -> Tensor:
    normal = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if facts.dtype == torch.bool:
        return normal > 0
    if facts.dtype.is_floating_point:
        return _VALUES[values](normal).to(facts.dtype)
    if facts.dtype.is_complex:
        other = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        return torch.complex(_VALUES[values](normal), _VALUES[values](other)).to(facts.dtype)
    high = (2, 1000, 6, 3)[values]
    return torch.randint(0, high, tuple(shape), generator=generator).to(facts.dtype)


def _operands(call: Call, shapes: Shapes, values: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(values)
    return [_tensor(facts, shape, values, generator) for facts, shape in zip(call.operands, shapes, strict=True)]


def _run(call: Call, operands: Sequence[Tensor]) -> list[Tensor] | None:
    """Its results; None where it refuses."""
    given = tree_map_only(Operand, lambda operand: operands[operand.index].clone(), call.arguments)
    args, kwargs = [], {}
    for argument in call.target._schema.arguments:
        if argument.name not in given:
            break
        if argument.kwarg_only:
            break
        args.append(given.pop(argument.name))
    kwargs = given
    try:
        value = call.target(*args, **kwargs)
    except Exception:  # whatever an op does not like about a part, it cannot be split so
        return None
    results = list(value) if isinstance(value, list | tuple) else [value]
    return results if all(isinstance(x, Tensor) for x in results) else None


def _runs(call: Call, shapes: Shapes) -> bool:
    return any(_Trial(call, shapes, values).wholes is not None for values in range(len(_VALUES)))


class _Trial:
    """The op on whole tensors of `shapes`; `wholes` is None where it refuses or is not the same twice."""

    def __init__(self, call: Call, shapes: Shapes, values: int) -> None:
        self.call = call
        self.operands = _operands(call, shapes, values)
        self.wholes = _run(call, self.operands)
        again = _run(call, self.operands) or []
        if (
            self.wholes is None
            or not len(again) == len(self.wholes) == len(call.results)
            or not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(self.wholes, again, strict=True))
        ):
            self.wholes = None

    def parts(self, dims: Sequence[int | None]) -> Iterator[list[list[Tensor]]]:
        """For each number of parts, per part the results of the op on it; an empty list where it refuses."""
        size = next(x.shape[d] for x, d in zip(self.operands, dims, strict=True) if d is not None)
        counts = [n for n in range(2, min(size, 16) + 1) if size % n == 0]
        if size <= 64 and size not in counts:
            counts.append(size)
        for count in counts:
            found: list[list[Tensor]] = []
            cut = [
                [x] * count if d is None else list(x.chunk(count, d)) for x, d in zip(self.operands, dims, strict=True)
            ]
            for operands in zip(*cut, strict=True):
                results = _run(self.call, [x.contiguous() for x in operands])
                if results is None:
                    found = []
                    break
                found.append(results)
            yield found


def _recombination(call: Call, dims: tuple[int | None, ...], trials: Sequence[_Trial]) -> tuple[Together, ...] | None:
    """How each result recombines in every trial; None where one does not."""
    size = next(f.shape[d] for f, d in zip(call.operands, dims, strict=True) if d is not None)
    possible: list[set[Together]] = []
    for facts in call.results:
        assert facts is not None
        ways: set[Together] = {d for d, n in enumerate(facts.shape) if n == size}
        possible.append(ways | {"sum", "max"} if facts.dtype.is_floating_point else ways)
    telling = [False] * len(possible)
    for trial in trials:
        assert trial.wholes is not None
        for parts in trial.parts(dims):
            if not parts:
                return None
            for r, whole in enumerate(trial.wholes):
                mine = [results[r] for results in parts]
                possible[r] = {how for how in possible[r] if _is_whole(mine, how, whole)}
                telling[r] = telling[r] or _tells(whole)
                if not possible[r]:
                    return None
    if not all(telling):
        return None
    chosen = [min(ways, key=lambda how: (not isinstance(how, int), str(how))) for ways in possible]
    if len({how for how in chosen if not isinstance(how, int)}) > 1:
        return None
    return tuple(chosen)


def _tells(whole: Tensor) -> bool:
    """Whether a result could tell a right recombination from a wrong one: it is not the same everywhere."""
    return whole.numel() > 0 and bool((whole != whole.flatten()[0]).any() or whole.numel() == 1)


def _is_whole(parts: Sequence[Tensor], how: Together, whole: Tensor) -> bool:
    if isinstance(how, int):
        if any(part.dim() != whole.dim() for part in parts):
            return False
        shapes = [[n for d, n in enumerate(part.shape) if d != how] for part in parts]
        rest = [n for d, n in enumerate(whole.shape) if d != how]
        if any(shape != rest for shape in shapes) or sum(part.shape[how] for part in parts) != whole.shape[how]:
            return False
        if len({part.shape[how] for part in parts}) > 1:
            return False
        made = torch.cat(list(parts), how)
    else:
        if any(part.shape != whole.shape for part in parts):
            return False
        stacked = torch.stack([part.double() for part in parts])
        made = (stacked.sum(0) if how == "sum" else stacked.amax(0)).to(whole.dtype)
    if made.dtype != whole.dtype:
        return False
    if not (whole.dtype.is_floating_point or whole.dtype.is_complex):
        return torch.equal(made, whole)
    eps = torch.finfo(whole.dtype).eps
    scale = whole.abs().nan_to_num(0, 0, 0).max().item() if whole.numel() else 0.0
    return torch.allclose(made, whole, rtol=64 * eps, atol=16 * eps * scale, equal_nan=True)
