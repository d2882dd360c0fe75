"""Sites that decide together, against every site deciding for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import captured

from costmodel.hardware import topology
from costmodel.presets import hardware
from passes.price import price as pricing
from passes.price.variables import Variables
from passes.program.program import Program
from passes.solver.solve import solve
from passes.space.space import Space, search_space


def bert() -> Program:
    """Gradients that two products and a bias' sum read; a head over a vocabulary."""
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(num_hidden_layers=1, vocab_size=3000, **sizes)).to(torch.bfloat16)
        ids = torch.zeros(16, 256, dtype=torch.long)
    return captured(model, {"input_ids": ids, "labels": ids})


def each_by_itself(space: Space) -> Variables:
    """A variable for each site, of which each option is one."""
    table = tuple(tuple((i,) for i in range(len(site.options))) for site in space.sites)
    sites = range(len(space.sites))
    return Variables(space, tuple((i,) for i in sites), table, {i: (i, 0) for i in sites})


@pytest.mark.parametrize("mesh", [{"tp": 4}, {"dp": 2, "tp": 2}], ids=str)
def test_sites_that_decide_together_cost_no_more_than_each_by_itself(
    mesh: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum for a bias follows the gather that the products beside it asked for; tied to what made it, it would pay an
    all-reduce of its own for each bias (10% of all costs over tp)."""
    batch_axes = (0,) if "dp" in mesh else ()
    space = search_space(bert(), topology(hardware("h100"), mesh), batch_axes)
    together = pricing.price(space)
    monkeypatch.setattr(pricing, "merged", each_by_itself)
    apart = pricing.price(space)
    assert len(together.groups) < 0.8 * len(apart.groups)
    least, least_apart = (solve(each.problem, gap=1e-7).seconds for each in (together, apart))
    assert least == pytest.approx(least_apart, rel=1e-5)
