"""The compiler from a captured program to a plan: solve each candidate, play its step, keep the best that fits.

    program -analyse-> Analysis -search_space, per strategy-> Space -price-> Problem -solve-> picks -play-> Schedule

Where an axis does not divide a dim that it might split, the program with that dim padded competes too.

The solver adds up costs; what overlaps only the schedule knows. So under `auto` several solutions compete, the named
strategies among them, and the schedule decides. A plan that a simpler one ties is not chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from costmodel.hardware import Hardware, Topology, hardware, topology
from costmodel.memory import ALLOCATION_BYTES, OPTIMIZERS
from passes.analysis import analyse
from passes.errors import NoFeasiblePlanError
from passes.local import LocalProgram, Storage
from passes.masks import use_causal_flag
from passes.named import STRATEGIES, check_strategy
from passes.pad import Pad
from passes.plan import Baseline, Bound, Plan, assignment_of, baseline, check_plan, make_plan
from passes.price import Budgeted, price
from passes.program import Program
from passes.randomness import own_randomness
from passes.recompute import Mode, recomputation
from passes.rewrite import rewrite
from passes.routing import has_routed, one_form, route_by_blocks, token_parts
from passes.schedule import Schedule, play
from passes.solve import Solution, solve
from passes.space import Pin, Space, search_space
from passes.timeline import Timeline, timeline_of
from passes.uneven import Padding, Paddings, padding_notes, stored_pads, uneven_dims, used_pads
from passes.weights import prepare_again

_TIE = 1e-3
"""Relative step time within which the simpler plan is taken."""
_SIMPLEST_FIRST = ("ddp", "fsdp", "megatron", "auto")
_HIDDEN_SHARES = (1.0, 0.3, 0.05)
"""What `auto` counts of the time that state gathers and gradient reductions take: all of it, or what often stays
exposed behind compute, or next to nothing. Each gives a proposal; the schedule judges them."""

_AUTO: tuple[Mode, ...] = ("pointwise", "selective", "full")
"""What `recompute="auto"` tries, each only where the one before does not fit at its fastest: to compute pointwise ops
again costs next to nothing, as they fuse with what reads them."""

Progress = Callable[[str], None]


def prepare(program: Program) -> Program:
    """What is done to a captured program before it is planned."""
    return prepare_again(one_form(own_randomness(use_causal_flag(program))))


@dataclass(frozen=True)
class Request:
    """What a plan is asked for, beside the program and the mesh.

    `budget_bytes`: per device; None: what the hardware has, less its reserve.
    `recompute`: a mode of `passes/recompute.py`, or "auto": the least that fits. `compiled`: whether the step runs
    compiled, which takes less memory. `stored`: parameters that already lie somewhere.
    """

    strategy: str = "auto"
    budget_bytes: int | None = None
    optimizer: str = "adamw"
    accumulate: int = 1
    recompute: Mode | Literal["auto"] = "auto"
    compiled: bool = True
    pins: Mapping[str, Pin] = field(default_factory=dict)
    stored: Mapping[str, Storage] | None = None


@dataclass(frozen=True)
class Candidate:
    """A solution under one strategy, and its step as played; `unbound`: the budget kept nothing from being faster."""

    strategy: str
    space: Space
    assignment: tuple[int, ...]
    solution: Solution
    schedule: Schedule
    unbound: bool
    padding: Padding


def on_mesh(hardware_: str | Hardware | None, axes: Sequence[tuple[str, int]]) -> Topology:
    """The mesh laid over the hardware, the last axis innermost."""
    return topology(hardware(hardware_), tuple(axes))


def compile_plan(
    program: Program,
    topology_: Topology,
    batch_axes: Sequence[int],
    request: Request,
    *,
    options: Mapping[str, Any] | None = None,
    example: str = "",
    progress: Progress = lambda stage: None,
    keep_timeline: bool = False,
) -> Plan:
    """The best plan found for `program` (as `prepare` left it).

    `options` and `example` are kept in the plan as they are. `keep_timeline`: the plan has its step's timeline.

    Raises:
        NoFeasiblePlanError: nothing fits; says by how much, what is largest, and the nearest change that would fit.
        ValueError: an unknown strategy, a pin that cannot be, a batch that the batch axes do not divide.
    """
    check_strategy(request.strategy)
    progress("analysing the graph")
    paddings = _PaddingsOf(program, topology_.sizes, tuple(batch_axes))
    budget = request.budget_bytes if request.budget_bytes is not None else int(topology_.device.usable_bytes)
    search = _Search(paddings, topology_, tuple(batch_axes), request, budget, progress)
    found: dict[str, list[Candidate]] = {}
    reasons: dict[str, str] = {}
    names = _SIMPLEST_FIRST if request.stored is None else (request.strategy,)
    for name in names:
        try:
            found[name] = search.candidates(name)
        except NoFeasiblePlanError as error:
            reasons[name] = str(error)
    asked = _SIMPLEST_FIRST if request.strategy == "auto" and request.stored is None else (request.strategy,)
    competing = [candidate for name in asked for candidate in found.get(name, [])]
    chosen = _best(competing, budget)
    if chosen is None:
        raise NoFeasiblePlanError(_why_nothing_fits(competing, reasons, budget, topology_))
    baselines = {name: _as_baseline(found.get(name, []), reasons.get(name, ""), budget) for name in STRATEGIES[1:]}
    bound = Bound(
        chosen.solution.seconds,
        chosen.solution.bound_s,
        f"of the summed costs under {chosen.strategy!r}; the schedule chose among {len(competing)} solutions",
    )
    plan = make_plan(
        chosen.space,
        chosen.assignment,
        chosen.schedule,
        bound=bound,
        baselines={name: b for name, b in baselines.items() if b is not None},
        budget_bytes=budget,
        notes=(*chosen.space.program.notes, *padding_notes(chosen.padding, chosen.space, chosen.assignment)),
        padded=chosen.padding.pads,
        strategy=chosen.strategy,
        options=dict(options or {}),
        example=example,
    )
    return replace(plan, timeline=_timeline(chosen, request)) if keep_timeline else plan


def _timeline(chosen: Candidate, request: Request) -> Timeline:
    """The chosen step, played once more with everything that happens in it kept."""
    schedule = play(
        chosen.space, chosen.assignment, optimizer=request.optimizer, accumulate=request.accumulate, events=True,
        compiled=request.compiled,
    )  # fmt: skip
    return timeline_of(schedule, 1 if chosen.space.topology.hardware.shared_host else ALLOCATION_BYTES)


def local_program(program: Program, plan: Plan, topology_: Topology, pins: Mapping[str, Pin]) -> LocalProgram:
    """One rank's program under `plan`, which was made with `pins`.

    Raises:
        PlanMismatchError: the plan is for another graph or mesh.
    """
    names = [axis.name for axis in topology_.axes]
    batch_axes = [names.index(name) for name in plan.batch_axes]
    check_plan(plan, program.fingerprint, [(axis.name, axis.size) for axis in topology_.axes])
    paddings = _PaddingsOf(program, topology_.sizes, tuple(batch_axes))
    analysis = paddings.under(plan.strategy).of(plan.padded).analysis
    space = search_space(
        analysis.program,
        topology_,
        batch_axes,
        strategy=plan.strategy,
        pins=pins,
        recompute=plan.recompute,
        analysis=analysis,
    )
    return rewrite(space, assignment_of(plan, space))


class _PaddingsOf:
    """The program's paddings under each strategy: routed experts depend on how many parts the tokens have."""

    def __init__(self, program: Program, sizes: Sequence[int], batch_axes: tuple[int, ...]) -> None:
        self._program, self._sizes, self._batch_axes = program, sizes, batch_axes
        self._routed = has_routed(program)
        self._known: dict[int, Paddings] = {}

    def under(self, strategy: str) -> Paddings:
        """The paddings that plans under `strategy` are made from."""
        parts = token_parts(self._program, strategy, self._sizes, self._batch_axes) if self._routed else 1
        if parts not in self._known:
            self._known[parts] = Paddings(analyse(route_by_blocks(self._program, parts)))
        return self._known[parts]


@dataclass(frozen=True)
class _Search:
    """Candidates for one program and mesh."""

    paddings: _PaddingsOf
    topology: Topology
    batch_axes: tuple[int, ...]
    request: Request
    budget: int
    progress: Progress

    def candidates(self, name: str) -> list[Candidate]:
        """Solutions under a strategy, the simplest first.

        A named strategy pads what it wants to split and cannot otherwise. `auto` pads where that is faster, dim by dim.

        Raises:
            NoFeasiblePlanError: there is none.
        """
        paddings = self.paddings.under(name)
        whole = paddings.whole
        needed = stored_pads(whole, self.request.stored or {}, self.topology.sizes)
        wanted = paddings.join(needed, uneven_dims(whole, self.topology.sizes, self.batch_axes, name))
        if wanted == needed:
            return self._solved(name, needed)
        padded = self._tried(name, wanted)
        if padded:
            used = paddings.join(needed, used_pads(padded[0].padding, padded[0].space, padded[0].assignment))
            padded = self._tried(name, used) if used != wanted else padded
        if not padded or padded[0].padding.pads == needed:
            return self._solved(name, needed)
        if name != "auto":
            return padded if _best(padded, self.budget) else self._solved(name, needed)
        plain = self._tried(name, needed)
        best = _best([*plain, *padded], self.budget)
        for each in sorted(padded[0].padding.pads, key=lambda p: p.size / p.padded):
            if best is not None and each in best.padding.pads and each not in needed:
                fewer = tuple(p for p in best.padding.pads if p != each)
                padded += self._tried(name, fewer, _HIDDEN_SHARES[:1])
                best = _best([*plain, *padded], self.budget)
        return [*plain, *padded]

    def _tried(self, name: str, pads: tuple[Pad, ...], shares: Sequence[float] | None = None) -> list[Candidate]:
        """Solutions with these dims padded; none where nothing fits, or a pin asks for what only others allow."""
        try:
            return self._solved(name, pads, shares)
        except (NoFeasiblePlanError, ValueError):
            return []

    def _solved(self, name: str, pads: tuple[Pad, ...], shares: Sequence[float] | None = None) -> list[Candidate]:
        """Solutions with these dims padded, those that compute the least again first."""
        request, padding = self.request, self.paddings.under(name).of(pads)
        self.progress(f"solving {name}" + (f", {len(pads)} dims padded" if pads else ""))
        modes = _AUTO if request.recompute == "auto" else (request.recompute,)
        space = search_space(
            padding.analysis.program,
            self.topology,
            self.batch_axes,
            request.stored,
            strategy=name,
            pins=request.pins,
            recompute=modes[0],
            analysis=padding.analysis,
        )
        shares = shares or (_HIDDEN_SHARES if name == "auto" else _HIDDEN_SHARES[:1])
        unique: dict[tuple[Mode, tuple[int, ...]], Candidate] = {}
        for mode in modes:
            if mode != modes[0]:
                space = replace(space, recomputed=recomputation(padding.analysis, mode))
            found = [_solved_within(space, name, request, self.budget, share, padding) for share in shares]
            for candidate in found:
                unique.setdefault((mode, candidate.assignment), candidate)
            if all(candidate.unbound for candidate in found):
                break
        return list(unique.values())


def _solved_within(space: Space, name: str, request: Request, budget: int, share: float, padding: Padding) -> Candidate:
    """The solution whose played peak fits, where there is one: the solver's sum of bytes is tightened by what the
    schedule finds on top of it, until both agree."""
    spec = OPTIMIZERS[request.optimizer]
    limit = math.inf
    kept = Budgeted(int(spec.state_bytes_per_param + spec.master_bytes_per_param))
    last: Candidate | None = None
    for _ in range(4):
        priced = price(space, limit, kept, state_share=share)
        try:
            solution = solve(priced.problem)
        except NoFeasiblePlanError:
            break
        assignment = priced.assignment(solution.picks, len(space.sites))
        schedule = play(space, assignment, optimizer=spec, accumulate=request.accumulate, compiled=request.compiled)
        over = schedule.peak_memory_bytes - budget
        last = Candidate(name, space, assignment, solution, schedule, over <= 0 and math.isinf(limit), padding)
        if over <= 0:
            return last
        limit = min(limit, solution.bytes) - over
        if limit <= 0:
            break
    assert last is not None
    return last


def _best(candidates: Sequence[Candidate], budget: int) -> Candidate | None:
    """The fastest that fits; candidates come simplest first, and a later one must be faster by more than a tie."""
    best: Candidate | None = None
    for candidate in candidates:
        if candidate.schedule.peak_memory_bytes > budget:
            continue
        if best is None or candidate.schedule.step_time_s < best.schedule.step_time_s * (1 - _TIE):
            best = candidate
    return best


def _as_baseline(candidates: Sequence[Candidate], reason: str, budget: int) -> Baseline | None:
    if candidates:
        smallest = min(candidates, key=lambda candidate: candidate.schedule.peak_memory_bytes)
        return baseline((_best(candidates, budget) or smallest).schedule, budget)
    return Baseline(math.inf, 0, False, reason) if reason else None


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


def _why_nothing_fits(
    candidates: Sequence[Candidate], reasons: Mapping[str, str], budget: int, topology_: Topology
) -> str:
    if not candidates:
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    nearest = min(candidates, key=lambda c: c.schedule.peak_memory_bytes)
    schedule = nearest.schedule
    needed = schedule.peak_memory_bytes
    top = schedule.memory.top[0]
    kinds = ", ".join(
        f"{kind} {_gib(size)}" for kind, size in sorted(schedule.memory.by_kind.items(), key=lambda i: -i[1])
    )
    return (
        f"no plan fits in {_gib(budget)} per device: the smallest found ({nearest.strategy}) needs {_gib(needed)}, "
        f"{_gib(needed - budget)} too much, at {schedule.peak_moment}. By kind: {kinds}. Largest tensor: {top.name} "
        f"({_gib(top.bytes)}). {_what_would_fit(schedule, budget, topology_)}"
    )


def _what_would_fit(schedule: Schedule, budget: int, topology_: Topology) -> str:
    """The smallest change that would fit, by the parts of the peak that scale with the batch and with the ranks."""
    by_kind = dict(schedule.memory.by_kind)
    at_rest = sum(by_kind.get(kind, 0) for kind in ("parameters", "gradients", "optimizer"))
    rest = schedule.peak_memory_bytes - at_rest
    ways = [f"Options(memory_budget={schedule.peak_memory_bytes}), if the device has that much"]
    if at_rest < budget and rest > 0:
        ways.insert(0, f"a batch per rank {math.ceil(rest / (budget - at_rest))} times smaller")
    elif at_rest > 0:
        ranks = topology_.ranks * math.ceil(at_rest / max(1, budget - min(rest, budget // 2)))
        ways.insert(0, f"about {ranks} ranks instead of {topology_.ranks} to share parameters and optimizer states")
    return "What would fit: " + "; or ".join(ways) + "."
