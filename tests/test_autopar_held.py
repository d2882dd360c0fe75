"""Gradients of backwards that exchanged nothing, added up by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from autopar.modules.held import hold, reduced
from passes.lower.lower import Unreduced


def _executable(names: list[str], seen: list[Unreduced]) -> Any:
    """A step that has gradients of `names`, and gives what it is to exchange as it is; the last needs no exchange."""
    outputs = [SimpleNamespace(kind="output", name="loss"), *(SimpleNamespace(kind="gradient", name=n) for n in names)]

    def reduce(terms: Unreduced) -> tuple[torch.Tensor | None, ...]:
        seen.append(terms)
        return (*terms.partial, None)

    return SimpleNamespace(local=SimpleNamespace(outputs=outputs), lowered=SimpleNamespace(reduce=reduce))


def test_terms_are_added_in_fp32_and_exchanged_as_they_were() -> None:
    """256 + 1 + 1 is 258 in bf16 where it is rounded once, 256 where each sum is."""
    runtime: Any = SimpleNamespace(unreduced={})
    seen: list[Unreduced] = []
    step, seeds = _executable(["w", "b", "whole"], seen), [torch.arange(2)]
    for number in (256.0, 1.0, 1.0):
        terms = [torch.full((2,), number, dtype=torch.bfloat16), torch.full((3,), number, dtype=torch.float64)]
        hold(runtime, step, Unreduced(terms, seeds))
        assert [term.tolist() for term in terms] == [[number] * 2, [number] * 3]
    found = reduced(runtime)
    assert [(name, value.dtype, value.tolist()) for name, value in found.items()] == [
        ("w", torch.bfloat16, [258.0] * 2),
        ("b", torch.float64, [258.0] * 3),
    ]
    assert seen[0].others is seeds
    assert reduced(runtime) == {}


def test_the_first_terms_are_not_added_into() -> None:
    """Compiled code may give one buffer twice, also that of two gradients."""
    runtime: Any = SimpleNamespace(unreduced={})
    step, term = _executable(["w", "b", "whole"], []), torch.ones(2)
    hold(runtime, step, Unreduced([term, term], []))
    hold(runtime, step, Unreduced([term, term], []))
    assert term.tolist() == [1, 1]
    assert {name: value.tolist() for name, value in reduced(runtime).items()} == {"w": [2, 2], "b": [2, 2]}


def test_gradients_of_two_steps_programs_are_added() -> None:
    runtime: Any = SimpleNamespace(unreduced={})
    for names, number in ((["w", "whole"], 1.0), (["b", "w", "whole"], 2.0)):
        terms = [torch.full((2,), number * (place + 1)) for place in range(len(names) - 1)]
        hold(runtime, _executable(names, []), Unreduced(terms, []))
    assert {name: value.tolist() for name, value in reduced(runtime).items()} == {"w": [5, 5], "b": [2, 2]}
