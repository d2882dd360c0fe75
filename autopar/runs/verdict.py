"""What a search answers: is sharding the state enough, is sharding the computation needed, would context parallelism or
a pipeline pay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autopar.runs.leads import chosen, close
from autopar.runs.profiling import Profiler
from autopar.runs.reach import Reach, Times, reach_down, reach_up
from autopar.runs.verdict_text import Basis, verdict_text
from autopar.runs.ways import Answer, Priced, Ways, fastest_of
from costmodel.hardware import Device


@dataclass(frozen=True)
class Verdict:
    """`answer`: the least that is enough: sharded state (FSDP2), sharded computation too (TP with sequence
    parallelism), context parallelism without stages, a pipeline, offload, or nothing that was tried."""

    answer: Answer
    state_s: float | None
    """Fastest step that fits with sharded state alone; None where none fits. The same for the others."""
    computation_s: float | None
    context_s: float | None
    pipeline_s: float | None
    offload_s: float | None
    text: tuple[str, ...]
    enough_gpus: int | None = None
    """The most GPUs, by doubling or halving those asked for, on which sharded state alone is enough at this batch."""
    close: tuple[Answer, ...] = ()
    """Where predictions cannot tell several ways apart: these, the chosen one among them."""

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def verdict(
    found: Sequence[Priced], profiler: Profiler, gpus: int, batch: int, budget: int,
    times_on: Callable[[int], Times] | None = None, error: float = Device.step_error,
) -> Verdict:  # fmt: skip
    """Of all that a search priced. `times_on`: steps on another number of GPUs, to tell how far the answer goes;
    `error`: by how much steps are off on average."""
    plain = [c for c in found if not c.setup.fp8]
    ways = fastest_of(plain)
    steps_s = {name: c.step_time_s for name, c in ways.resident.items()}
    answer: Answer = chosen(steps_s) if steps_s else "offload" if ways.offload else "nothing"
    near = tuple(close(steps_s, error)) if steps_s else ()
    reach = _reach(answer, ways, gpus, batch, profiler, times_on) if times_on else None
    basis = Basis(plain, ways, answer, near, gpus, batch, budget, error, reach)
    state_s, computation_s, context_s, pipeline_s, offload_s = (
        c.step_time_s if c else None for c in (ways.state, ways.computation, ways.context, ways.pipeline, ways.offload)
    )
    return Verdict(
        answer, state_s, computation_s, context_s, pipeline_s, offload_s, verdict_text(basis, profiler),
        enough_gpus=reach.gpus if reach else None, close=near if len(near) > 1 else (),
    )  # fmt: skip


def _reach(
    answer: Answer, ways: Ways, gpus: int, batch: int, profiler: Profiler, times_on: Callable[[int], Times]
) -> Reach | None:
    """How far sharded state alone goes: on more GPUs where it is enough, else on fewer, if it can use them at all."""
    if answer == "state":
        return reach_up(gpus, batch, times_on)
    if answer in ways.resident and (batch % gpus or ways.state):
        return reach_down(gpus, batch, profiler.hardware.ranks_per_node, times_on)
    return None
