"""What is claimed of added entries, against the ops themselves on entries drawn from what is claimed of theirs."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from rule_check import run
from rule_samples import SAMPLES
from test_passes_rules import pointwise_ops
from torch import Tensor, fx

from passes.padding.zones import Zone, is_pointwise, join, pointwise_zone

aten = torch.ops.aten
LEAST, COUNT = torch.finfo(torch.float32).min, 24
ZONES: dict[torch.dtype, list[Zone]] = {
    torch.float32: [0.0, 1.0, -1.0, 2.5, -torch.inf, torch.inf, LEAST, "positive", "nonnegative", "finite", "edge"],
    torch.int64: [0, 1, -2, 7, "positive", "nonnegative", "finite", "nowhere"],
    torch.bool: [True, False, "finite"],
}
for _zones in ZONES.values():
    _zones.append("real")
ZONES[torch.float32].append("any")
CAST_TO = [torch.float16, torch.bfloat16, torch.float64, *ZONES]
CASTS = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}
NOWHERE = -127


def entries(zone: Zone, dtype: torch.dtype, random: Random) -> Tensor:
    """Numbers of a zone, zeros among them where it allows that."""
    if not isinstance(zone, str):
        return torch.full((COUNT,), zone, dtype=dtype)
    generator = torch.Generator().manual_seed(random.randrange(2**30))
    if dtype is torch.bool:
        return torch.rand(COUNT, generator=generator) > 0.5
    x = 3 * torch.randn(COUNT, generator=generator)
    if zone == "edge":
        x[::3], x[1::3] = LEAST, -LEAST
    elif zone == "any":
        x[::4], x[1::4], x[2::4] = torch.nan, torch.inf, -torch.inf
    elif zone == "nowhere":
        x[:] = NOWHERE
    elif zone == "positive":
        x = x.abs() + (0.25 if dtype.is_floating_point else 1)
    else:
        x[::5] = 0
    return (x.abs() if zone == "nonnegative" else x).to(dtype)


def holds(zone: Zone, x: Tensor) -> bool:
    """Whether the entries are of the zone; numbers up to how scalars and vectors are rounded."""
    if not isinstance(zone, str):
        wide = torch.complex128 if x.is_complex() else torch.float64
        return torch.allclose(x.to(wide), torch.tensor(zone, dtype=wide), rtol=1e-5, atol=0)
    if zone == "any" or zone == "real":
        return True
    if zone == "nowhere":
        return bool((x == NOWHERE).all())
    bound = {"positive": x > 0, "nonnegative": x >= 0}.get(zone, torch.ones_like(x, dtype=torch.bool))
    return bool((bound & torch.isfinite(x)).all())


def drawn(op: Any, random: Random) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of the op: (zone, dtype) for a tensor, else a value."""
    values = {"number": [2, -1, 0.5, 1], "bool": [False, True], "Optional[number]": [None, 1, 2]}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    division = any(name in str(op) for name in ("div", "mod", "remainder", "gcd", "lcm"))  # of whole numbers, by zero
    dtypes = random.choice([[torch.float32], [torch.float32], [torch.float32] if division else list(ZONES)])
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.name == "dtype" and op in CASTS:
            found: Any = random.choice(CAST_TO)
        elif argument.name == "alpha":
            found = random.choice([1, 1, 2, -1])
        elif kind == "Tensor":
            dtype = torch.bool if argument.name in ("condition", "mask") else random.choice(dtypes)
            found = random.choice(ZONES[dtype]), dtype
        else:
            has_default = argument.has_default_value()
            found = argument.default_value if has_default else random.choice(values.get(kind, [2]))
        if not argument.kwarg_only:
            args.append(found)
        elif found is not None and found != argument.default_value:
            kwargs[argument.name] = found
    return args, kwargs


OPS = sorted({op for op in (*pointwise_ops(), *(sample.target for sample in SAMPLES)) if is_pointwise(op)}, key=str)
BY_HAND = {aten.add.Tensor, aten.sub.Tensor, aten.where.self}
"""Of other ops on numbers alone a number is claimed that the op gave itself. Kernels give a scalar another result than
they give many, where it is infinite or nearly so."""


def holds_of(op: Any, args: list[Any], kwargs: dict[str, Any], random: Random, *, same: bool = False) -> None:
    """Asserts what is claimed of an op on such arguments, its operands one tensor where `same`."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x") if isinstance(each, tuple) else each for each in args]
    given = [each for each in args if isinstance(each, tuple)]
    zones, dtypes = [zone for zone, _ in given], [dtype for _, dtype in given]
    operands = [entries(zone, dtype, random) for zone, dtype in given]
    if same:
        nodes, operands = nodes[:1] * len(nodes), operands[:1] * len(operands)
    if op in (aten.div.Tensor, aten.reciprocal.default) and zones[-1] == "real":
        operands[-1] = operands[-1].where(operands[-1] != 0, 1)  # else the model's own result is no number
    numbers = [zone for zone in zones if not isinstance(zone, str)]
    if op not in BY_HAND and len(numbers) == len(zones) and any(abs(zone) >= -LEAST for zone in numbers):
        return
    if op is aten.masked_fill.Scalar and not dtypes[0].is_floating_point:
        return
    values = iter(operands)
    try:
        made = run(op, [next(values) if isinstance(node, fx.Node) else node for node in nodes], kwargs)
    except (RuntimeError, NotImplementedError):  # not of these dtypes
        return
    zone = pointwise_zone(graph.call_function(op, tuple(nodes), kwargs), zones, dtypes, made.dtype)
    assert holds(zone, made), f"{given} {nodes} {kwargs}: {zone}, {made}"


@pytest.mark.parametrize("op", OPS, ids=str)
def test_what_is_claimed_of_a_pointwise_op_holds(op: Any) -> None:
    random = Random(str(op))
    for _ in range(100):
        holds_of(op, *drawn(op, random), random)


def test_what_is_claimed_of_any_two_zones_holds() -> None:
    random, two = Random(0), [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default, aten.eq.Tensor]
    for op in two:
        for dtype in (torch.float32, torch.int64):
            for one in ZONES[dtype]:
                holds_of(op, [(one, dtype), (one, dtype)], {}, random, same=True)
                for other in ZONES[dtype]:
                    holds_of(op, [(one, dtype), (other, dtype)], {}, random)


def test_what_holds_of_entries_of_several_zones() -> None:
    random = Random(0)
    for dtype, zones in ZONES.items():
        for one in zones:
            for other in zones:
                x = torch.cat([entries(zone, dtype, random) for zone in (one, other)])
                zone = join([one, other])
                assert holds(zone, x), (one, other)
                if dtype is torch.float32:  # sums of the least float are no numbers
                    node = fx.Graph().placeholder("x")
                    double = node.graph.call_function(aten.add.Tensor, (node, node))
                    assert holds(pointwise_zone(double, [zone, zone], [dtype, dtype], dtype), x + x), (one, other)
