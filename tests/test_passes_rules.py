from __future__ import annotations

import pytest
from rule_check import Sample, check, leaves
from rule_samples import SAMPLES

from passes.rules.table import RULES


def test_every_rule_has_a_sample() -> None:
    sampled = {sample.target for sample in SAMPLES}
    names = {str(target) for target in sampled}
    assert not [str(target) for target in RULES if target not in sampled and str(target) not in names]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_rule_holds_when_it_is_executed(sample: Sample) -> None:
    assert check(sample, (2,)) > sample.splits
    check(sample, (3,))
    check(sample, (2,), "operands")
    check(sample, (2,), "results")


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_rule_holds_on_two_axes(sample: Sample) -> None:
    check(sample, (2, 2), limit=12)
    check(sample, (2, 2), "operands", limit=6)
    check(sample, (2, 3), limit=6)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_rule_splits_what_it_can(sample: Sample) -> None:
    assert leaves(sample) >= sample.splits
