"""What a search found: candidates, each a way to run with its price, and the ranking of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autopar.options import Options, Recompute
from autopar.runs.ranking import NEAREST, gathered_words, ranking_table, ranking_text
from autopar.runs.verdict import Verdict
from passes.errors import NoFeasiblePlanError
from passes.plan.frontier import FrontierPoint
from passes.plan.plan import Plan
from passes.runs.setup import Setup


@dataclass(frozen=True)
class Candidate:
    """One way to run: seconds of a step and bytes of the busiest rank. `priced_only`: what of it no plan does yet."""

    setup: Setup
    step_time_s: float
    peak_memory_bytes: int
    over_bytes: int
    """By how much it does not fit; 0 where it does."""
    seconds: Mapping[str, float]
    bytes: Mapping[str, float]
    hidden_s: float = 0.0
    """What is sent behind compute."""

    @property
    def fits(self) -> bool:
        return self.over_bytes == 0

    @property
    def priced_only(self) -> tuple[str, ...]:
        return self.setup.priced_only

    @property
    def mesh(self) -> dict[str, int]:
        """As `autopar.plan` takes it; pipeline and context ranks are named `pp` and `cp`. Ranks that share experts
        (`setup.ep`) are among the others."""
        setup = self.setup
        axes = {"pp": setup.pp, "dp_replicate": setup.dp_replicate, "dp_shard": setup.dp_shard, "cp": setup.cp}
        return {name: size for name, size in (*axes.items(), ("tp", setup.tp)) if size > 1} or {"dp_shard": 1}


@dataclass(frozen=True)
class SearchResult:
    """What was found: `candidates` fit, fastest first; `too_large` do not, the nearest first.

    `bound_s`: no plan's candidate whose schedule was not played takes less, but for those that do not fit, and those
    that another of their mesh beats, or loses to by less than a hundredth; infinity where there are no others.
    """

    model: str
    gpus: int
    hardware: str
    global_batch: int
    sequence: int | None
    budget_bytes: int
    candidates: tuple[Candidate, ...]
    too_large: tuple[Candidate, ...]
    verdict: Verdict
    counted: int
    played: int
    bound_s: float
    notes: tuple[str, ...] = ()
    asked: Options = field(default_factory=Options, compare=False)
    """The options that the search was given, with the optimizer that it budgeted for."""

    @property
    def best(self) -> Candidate:
        """The fastest that a plan can do today.

        Raises:
            NoFeasiblePlanError: none fits.
        """
        for candidate in self.candidates:
            if not candidate.priced_only:
                return candidate
        raise NoFeasiblePlanError(f"no plan fits on {self.gpus} x {self.hardware}; {self.verdict.text[0]}")

    def options(self, candidate: Candidate | None = None) -> Options:
        """What `autopar.plan` takes to plan a candidate (the best) on its `mesh` as it was priced."""
        setup = (candidate or self.best).setup
        asked = self.asked
        recompute: Recompute = "auto" if setup.recompute == "pointwise" else setup.recompute
        reshard = asked.reshard_after_forward if setup.reshard else False
        regather = True if setup.gathers_again and setup.is_played else asked.regather_activations
        return replace(
            asked, accumulate=setup.accumulate, recompute=recompute, reshard_after_forward=reshard,
            regather_activations=regather, async_tp=asked.async_tp and setup.tp > 1,
        )  # fmt: skip

    def frontier(self, plan: Plan | None = None) -> tuple[FrontierPoint, ...]:
        """What fits and the nearest that does not, for `plan.report(path, frontier=...)`.

        plan: the best, planned (`options`): it stands there with its own figures, which the search only approached.
        """
        best = next((c for c in self.candidates if not c.priced_only), None)
        found = (*self.candidates, *self.too_large[:NEAREST])
        points = [_point(c, chosen=c is best and plan is None) for c in found]
        if plan is None:
            return tuple(points)
        label = " ".join(f"{name}={size}" for name, size in plan.axes)
        made = FrontierPoint(label, plan.step_time_s, plan.peak_memory_bytes, plan.fits, chosen=True)
        return (made, *points)

    def table(self, top: int | None = None) -> str:
        """The ranking as text."""
        return ranking_table(self, top)

    def __str__(self) -> str:
        return self.text()

    def text(self, name: str | None = None, top: int = 10) -> str:
        """The verdict and the ranking; `name` is what the model is called."""
        return ranking_text(self, name, top)

    def to_json(self) -> str:
        """The whole result as JSON, for scripts."""
        content = {
            "format": "autopar-search", "version": 1,
            "model": self.model, "gpus": self.gpus, "hardware": self.hardware, "global_batch": self.global_batch,
            "sequence": self.sequence, "budget_bytes": self.budget_bytes, "counted": self.counted,
            "played": self.played, "bound_s": self.bound_s if self.bound_s < math.inf else None,
            "verdict": self.verdict.as_json(),
            "candidates": [_as_json(c) for c in self.candidates],
            "too_large": [_as_json(c) for c in self.too_large], "notes": list(self.notes),
        }  # fmt: skip
        return json.dumps(content, indent=1)


def parallelism(setup: Setup) -> Setup:
    """The setup without what a search decides for it; of setups that agree in the rest one is listed, the fastest.

    Left out are the micro-batch, virtual stages, recompute, whether gathers are repeated, and how many ranks share
    experts (but whether any do) and when tokens are sent to them, and whether a solver or Megatron-LM's plan lays out
    tensor parallelism.
    """
    return replace(
        setup, micro_batch=1, accumulate=1, recompute="pointwise", whole_blocks=False, virtual=1, reshard=True,
        gathers_again=False, ep=min(setup.ep, 2), experts_beside=False, solved=False,
    )  # fmt: skip


def distinct(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Without those that another of the same parallelism beats."""
    seen: set[Setup] = set()
    for candidate in candidates:
        if (kind := parallelism(candidate.setup)) not in seen:
            seen.add(kind)
            yield candidate


def _point(candidate: Candidate, chosen: bool) -> FrontierPoint:
    setup = candidate.setup
    parts = [f"{name}={size}" for name, size in candidate.mesh.items()]
    parts += [f"{setup.micro_batch} x {setup.accumulate}", setup.recompute]
    parts += ["experts beside"] if setup.experts_beside else []
    parts += [*(["tp by solver"] if setup.solved else []), *gathered_words(setup)]
    return FrontierPoint(
        " ".join(parts), candidate.step_time_s, candidate.peak_memory_bytes, candidate.fits, chosen,
        ", ".join(candidate.priced_only),
    )  # fmt: skip


def _as_json(candidate: Candidate) -> dict[str, Any]:
    setup = {name: getattr(candidate.setup, name) for name in Setup.__dataclass_fields__}
    return {
        "mesh": candidate.mesh, "setup": setup, "step_time_s": candidate.step_time_s,
        "peak_memory_bytes": candidate.peak_memory_bytes, "over_bytes": candidate.over_bytes,
        "priced_only": list(candidate.priced_only), "seconds": dict(candidate.seconds), "bytes": dict(candidate.bytes),
        "hidden_s": candidate.hidden_s,
    }  # fmt: skip
