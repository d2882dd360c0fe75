"""The table of rules: an op's `Form`, and how a rank runs its part where that takes more than the same op.

A rule file registers with `@rule(op, ...)`; nothing else needs to know it. `form_of(call)` looks an op up: its own
rule, or the general one for pointwise ops, else `UnsupportedOpError`. An op of a package that may not be imported is
registered by its name, `"transformers.grouped_mm_fallback.default"`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from passes.errors import UnsupportedOpError
from passes.rules.call import Call
from passes.rules.form import Form, FormBuilder

Rule = Callable[[Call], Form]
RULES: dict[Any, Rule] = {}
POINTWISE: list[Rule] = []


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of `targets`."""

    def register(function: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, f"{target} has two rules"
            RULES[target] = function
        return function

    return register


def rule_of(target: Any) -> Rule | None:
    """The rule of an op; None where no table knows it."""
    found = RULES.get(target) or RULES.get(str(target))
    if found is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return POINTWISE[0]
    return found


def form_of(call: Call) -> Form:
    """The op's form.

    Raises:
        UnsupportedOpError: no table knows the op.
    """
    found = rule_of(call.target)
    if found is not None:
        return found(call)
    raise UnsupportedOpError(f"{call.target}: no sharding rule; it will be replicated")


def whole_form(call: Call) -> Form:
    """The form under which nothing may be split: every operand and result is whole."""
    build = FormBuilder()
    operands = [build.dims(operand.shape, whole=True) for operand in call.operands]
    results = [build.dims(result.shape, whole=True) if result else () for result in call.results]
    return build.form(operands, results)
