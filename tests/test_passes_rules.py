from __future__ import annotations

from math import prod
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_check import Sample, check, leaves, one_op, run
from rule_samples import SAMPLES, b, f, i, p

from passes.rules.table import RULES

aten = torch.ops.aten
SAMPLED = {sample.target for sample in SAMPLES}


def test_every_rule_has_a_sample() -> None:
    names = {str(target) for target in SAMPLED}
    assert not [str(target) for target in RULES if target not in SAMPLED and str(target) not in names]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_rule_holds_when_it_is_executed(sample: Sample) -> None:
    assert check(sample, (2,)) > sample.splits
    check(sample, (3,))
    check(sample, (2,), "operands", limit=12)
    check(sample, (2,), "results", limit=12)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_rule_holds_on_two_axes(sample: Sample) -> None:
    check(sample, (2, 2), limit=8)
    check(sample, (2, 2), "operands", limit=4)
    check(sample, (2, 3), limit=4)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_rule_splits_what_it_can(sample: Sample) -> None:
    assert leaves(sample) >= sample.splits


# ---------------------------------------------------------------------------------------------------- pointwise ops
def pointwise_ops() -> list[Any]:
    """Every functional aten op that torch tags as pointwise."""
    found: list[Any] = []
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            tensors = any(str(a.type) == "Tensor" for a in op._schema.arguments)
            tags = (torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view)
            functional = not op._schema.is_mutable and not any(tag in op.tags for tag in tags)
            made = [str(r.type) for r in op._schema.returns] == ["Tensor"]
            if torch.Tag.pointwise in op.tags and functional and tensors and made:
                found.append(op)
    return found


def _pointwise_sample(op: Any, draw: Any) -> Sample:
    """Arguments by their schema type; the second tensor broadcasts against the first."""
    values: dict[str, Any] = {"number": 2, "int": 2, "float": 0.5, "bool": False, "Tensor": None}
    shapes = iter([(4, 6), (6,), (4, 1), (4, 6), (6,)])
    args = []
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.kwarg_only or argument.default_value is not None or kind.startswith("Optional"):
            break
        args.append(draw(*next(shapes)) if kind == "Tensor" else values[kind])
    return Sample(op, tuple(args))


DRAWS = (p, lambda *shape: i(5, *shape, low=1), b, lambda *shape: p(*shape).to(torch.bfloat16))


@pytest.mark.parametrize("op", pointwise_ops(), ids=str)
def test_pointwise_ops_are_pointwise(op: Any) -> None:
    """Broadcast operands of several dtypes; an op that takes none of them has a sample of its own or is not traced."""
    tried = 0
    for draw in DRAWS:
        try:
            sample = _pointwise_sample(op, draw)
            run(op, sample.args, {})
            one_op(sample)
        except (RuntimeError, NotImplementedError, KeyError, ValueError, TypeError, IndexError):
            continue
        assert check(sample, (2,)) >= 3
        tried += 1
        if tried == 2:
            break
    assert tried or op in SAMPLED, f"{op}: no dtype tried runs; give it a sample"


# ---------------------------------------------------------------------------------------------------------- reshapes
@given(st.lists(st.sampled_from([1, 2, 2, 3, 4, 5, 6]), min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_any_reshape(shape: list[int], random: Random) -> None:
    """Dims are merged and cut at random places."""
    count = prod(shape)
    target: list[int] = []
    while count > 1 and len(target) < 4:
        cut = random.choice([n for n in range(1, count + 1) if count % n == 0])
        target.append(cut)
        count //= cut
    target.append(count)
    random.shuffle(target)
    sample = Sample(aten.view.default, (f(*shape), target))
    check(sample, (2,))
    check(sample, (2, 2), limit=8)
    check(sample, (2,), "operands", limit=8)
    check(sample, (3,), "results", limit=8)


def test_a_split_of_a_dim_survives_flattening() -> None:
    """Batch and sequence, flattened and cut again, may both still be split."""
    assert leaves(Sample(aten.view.default, (f(4, 6, 8), [24, 8]))) == 3
    assert leaves(Sample(aten.view.default, (f(6, 4), [4, 6]))) == 0
