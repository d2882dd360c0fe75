"""A pipeline for tests of the API: the real stages with a plan that holds nothing but its decisions."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from autopar.options import Options
from autopar.pipeline import Pipeline
from costmodel.hardware import topology
from costmodel.presets import hardware as hardware_named
from passes.capture import capture as capture_
from passes.local import DimShard, LocalProgram, Storage
from passes.price import price
from passes.program import Program
from passes.randomness import own_randomness
from passes.rewrite import rewrite as rewrite_
from passes.solve import solve
from passes.space import search_space
from passes.weights import prepare_again


@dataclass(frozen=True)
class StandinPlan:
    """Decisions, and what makes the space they are of."""

    fingerprint: str
    axes: tuple[tuple[str, int], ...]
    strategy: str
    hardware: Any
    example: str
    assignment: tuple[int, ...]
    batch_axes: tuple[int, ...]
    stored: tuple[tuple[str, Any], ...]
    options: Options
    timeline: None = None
    peak_memory_bytes: int = 0

    def to_json(self) -> str:
        stored = [(n, s.shape, [None if d is None else d.dim for d in s.shards], s.state_axes) for n, s in self.stored]
        return json.dumps({**self.__dict__, "stored": stored, "options": [self.options.compile, self.options.seed,
                           self.options.batch_axes]})  # fmt: skip


def load(text: str) -> StandinPlan:
    found = json.loads(text)
    compile, seed, batch_axes = found.pop("options")
    stored = tuple(
        (n, Storage(tuple(shape), tuple(None if d is None else DimShard(d) for d in dims), tuple(state)))
        for n, shape, dims, state in found.pop("stored")
    )
    plan = StandinPlan(**found, stored=stored, options=Options(compile=compile, seed=seed, batch_axes=batch_axes))
    return replace(
        plan,
        axes=tuple((n, s) for n, s in plan.axes),
        assignment=tuple(plan.assignment),
        batch_axes=tuple(plan.batch_axes),
    )


def capture(model: nn.Module, args: Any, kwargs: Any, **rest: Any) -> Program:
    program = prepare_again(own_randomness(capture_(model, args, kwargs, **rest)))
    fingerprint = str(len(program.graph.graph.nodes)) + str([o.name for o in program.outputs])
    shapes = [list(n.meta["val"].shape) for n in program.graph.graph.find_nodes(op="placeholder")]
    return replace(program, fingerprint=fingerprint + str(shapes))


def pipeline(strategy: str = "fsdp") -> Pipeline:
    """The stages under `strategy`, whatever is asked for."""

    def compile_plan(program: Program, axes: Any, *, batch_axes: Any, hardware: Any, options: Options, example: str,
                     **_: Any) -> StandinPlan:  # fmt: skip
        machine = topology(hardware_named(hardware or "h100"), dict(axes))
        stored = program.stored
        space = search_space(program, machine, batch_axes, stored, strategy=strategy)
        priced = price(space)
        picks = solve(priced.problem, gap=1e-2).picks
        assignment = tuple(int(i) for i in priced.assignment(picks, len(space.sites)))
        return StandinPlan(program.fingerprint, axes, strategy, hardware, example, assignment, batch_axes,
                           tuple(stored.items()), options)  # fmt: skip

    def rewrite(program: Program, plan: StandinPlan) -> LocalProgram:
        machine = topology(hardware_named(plan.hardware or "h100"), dict(plan.axes))
        space = search_space(program, machine, plan.batch_axes, dict(plan.stored) or None, strategy=plan.strategy)
        return rewrite_(space, plan.assignment)

    return Pipeline(
        lambda *_: None, capture, compile_plan, rewrite, load, lambda plan: plan.options, lambda plan: plan.hardware
    )
