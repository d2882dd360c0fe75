"""What one way to run takes, as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from costmodel.memory import gib
from passes.plan.report_text import MEMORY_KINDS, percent_text, seconds_text, step_text
from passes.plan.tables import terminal_width, text_table, wrapped_lines

if TYPE_CHECKING:
    from autopar.runs.pricing import Price
    from passes.runs.setup import Setup

_SECONDS = {
    "compute": "products, attention and all else",
    "recompute": "what backward computes again",
    "slowed": "compute, by collectives that run beside it",
    "casts": "operands to fp8",
    "bubble": "stages that wait for the first and the last micro-batch",
    "messages": "between stages, that compute waits for",
    "experts": "tokens to their experts and back",
    "exposed state": "parameters and gradients that compute waits for",
    "exposed activations": "sums over ranks, as of the loss, that compute waits for",
    "optimizer": "the update",
    "between": "what is none of these; of products that are cut in parts, what they take longer",
}
_STAGED = {"compute": "products, attention and all else; of stages the slowest"}
_SPLIT = {"exposed activations": "tensor parallelism's collectives that compute waits for"}
_BYTES = {**MEMORY_KINDS, "activations and working": "kept from forward for backward, and temporary results"}
_STATES = {
    "zero0": "state whole on every data-parallel rank", "zero1": "optimizer sharded (ZeRO-1)",
    "zero2": "optimizer and gradients sharded (ZeRO-2)", "zero3": "all state sharded (ZeRO-3)",
}  # fmt: skip


def price_text(price: Price, name: str | None, measured_s: float | None) -> str:
    """The figures first, then what they are made of."""
    width = terminal_width()
    setup = price.setup
    batch = f"global batch {setup.global_batch} ({setup.micro_batch} x {setup.accumulate} a data-parallel rank)"
    where = f", sequence {price.sequence}" if price.sequence else ""
    counted = "tokens" if price.sequence else "samples"
    budget = f"{gib(price.peak_memory_bytes)} of {gib(price.budget_bytes)} per GPU"
    budget += "" if price.fits else f": DOES NOT FIT, {gib(price.over_bytes)} over"
    lines = [
        *wrapped_lines(f"{name or price.model} on {price.gpus} x {price.hardware}, {batch}{where}", width, ""),
        *wrapped_lines(ranks_text(setup), width, "  "),
        f"  {step_text(price.step_time_s)} per step: {price.units_per_s:,.0f} {counted}/s/GPU, "
        f"{percent_text(price.utilisation)} of the peak",
        f"  {budget}",
    ]
    if measured_s is not None:
        lines.append(f"  measured {step_text(measured_s)}: {_compared(price.step_time_s / measured_s - 1)}")
    words = _SECONDS | (_STAGED if setup.pp > 1 else {}) | (_SPLIT if setup.tp > 1 else {})
    rows = [
        [part, seconds_text(seconds), percent_text(seconds / price.step_time_s), words.get(part, "")]
        for part, seconds in price.seconds.items()
        if seconds >= 0.001 * price.step_time_s
    ]
    lines += ["", *text_table(rows, ["of a step", "time", "share", ""], width, shrink=[3], right=[1, 2])]
    if price.hidden_s:
        lines.append(f"  {seconds_text(price.hidden_s)} of what is sent runs behind compute")
    rows = [
        [part, gib(size), percent_text(size / price.peak_memory_bytes), _BYTES.get(part, "")]
        for part, size in price.bytes.items()
        if size >= 0.001 * price.peak_memory_bytes
    ]
    lines += ["", *text_table(rows, ["of the memory", "bytes", "share", ""], width, shrink=[3], right=[1, 2]), ""]
    if setup.priced_only:
        lines += wrapped_lines(f"no plan does these yet: {', '.join(setup.priced_only)}", width, "")
    for note in price.notes:
        first, *rest = wrapped_lines(f"- {note}", width - 2, "")
        lines += [first, *(f"  {line}" for line in rest)]
    return "\n".join(lines)


def ranks_text(setup: Setup) -> str:
    """Who does what, in a sentence."""
    stages = f"{setup.pp} balanced stages" if setup.balanced else f"{setup.pp} stages"
    stages += f" of {setup.virtual} parts in turn" if setup.virtual > 1 else ""
    stages += " (embedding and head as a layer each)" if setup.ends_count else ""
    copies = f"{setup.dp_replicate} copies x {setup.dp_shard}" if setup.dp_replicate > 1 else str(setup.data_ranks)
    parts = [
        *([stages] if setup.pp > 1 else []),
        f"{copies} data-parallel",
        *([f"{setup.cp} context-parallel"] if setup.cp > 1 else []),
        *([f"{setup.tp} tensor-parallel"] if setup.tp > 1 else []),
    ]
    beside = ", tokens sent beside another micro-batch" if setup.experts_beside else ""
    each = {"alltoall": ", tokens sent for each expert", "deepep": ", tokens sent by DeepEP"}.get(setup.dispatcher, "")
    cut = f", cut in {setup.tp}" if setup.experts_cut else ""
    shared = [f"{setup.ep} ranks share a layer's experts{cut}{each}{beside}"] if setup.ep > 1 else []
    kept = [] if setup.reshard or setup.state != "zero3" else ["gathered parameters kept for backward"]
    waited = ["compute waits for what of state is sent"] if not setup.overlap else []
    waited += ["compute waits for what was updated"] if setup.gathers_waited else []
    again = "layers run again to their end" if setup.runs_whole else f"recompute {setup.recompute}"
    return "; ".join([" x ".join(parts), *shared, _STATES[setup.state], *kept, *waited, again])


def _compared(error: float) -> str:
    return f"predicted {abs(error):.1%} too {'slow' if error > 0 else 'fast'}"
