"""Costs as formulas: the published closed forms, and this package's own ring prices, as sympy expressions.

Symbols as in the papers: `b` micro-batch, `s` sequence, `h` hidden, `a` heads, `f` FFN width, `L` layers, `V`
vocabulary; `t` tensor-parallel, `p` pipeline, `d` data-parallel ranks; `m` micro-batches, `v` virtual stages, `Psi`
parameters; `k` experts per token, `e` expert-parallel ranks. Of a collective: `n` ranks, `S` bytes of the full tensor;
of its link `alpha` latency, `pi` pipeline and `gamma` base seconds and `beta` bytes per second; `mu` the device's
memory rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from costmodel.collectives import CHUNK_BYTES, COPY_PASSES

Expr = Any
"""A sympy expression (sympy is untyped)."""


def _symbol(name: str) -> Expr:
    return sympy.Symbol(name, positive=True)


b, s, h, a, f, L, V = map(_symbol, ("b", "s", "h", "a", "f", "L", "V"))
t, p, d, m, v, Psi = map(_symbol, ("t", "p", "d", "m", "v", "Psi"))
k, e, B = map(_symbol, ("k", "e", "B"))
n, S = map(_symbol, ("n", "S"))
alpha, pi, gamma, beta, mu = map(_symbol, ("alpha", "pi", "gamma", "beta", "mu"))


@dataclass(frozen=True)
class ClosedForm:
    """A published quantity: its expression, what it counts, and where it is from."""

    name: str
    expression: Expr
    unit: str
    source: str
    note: str = ""


MEGATRON = "arXiv 2104.04473"
RECOMPUTE = "arXiv 2205.05198"
ZERO = "arXiv 1910.02054"


def ring_elements(kind: str, elements: Expr, ranks: Expr) -> Expr:
    """Elements that one rank sends in a ring (pairwise, for an all-to-all), of a full tensor of `elements`.

    Raises:
        ValueError: an unknown kind.
    """
    share = (ranks - 1) / ranks
    forms = {
        "all_gather": share * elements,
        "reduce_scatter": share * elements,
        "all_reduce": 2 * share * elements,
        "all_to_all": share * elements,
        "broadcast": elements,
        "send_recv": elements,
    }
    if kind not in forms:
        raise ValueError(f"unknown collective {kind!r}; known are {', '.join(forms)}")
    return sympy.sympify(forms[kind])


def tp_elements_per_layer() -> Expr:
    """Elements sent per layer and micro-batch, forward and backward, by tensor parallelism: 4 all-reduces of b·s·h."""
    return 4 * ring_elements("all_reduce", b * s * h, t)


def tp_sp_elements_per_layer(*, gathered_again: int = 0) -> Expr:
    """The same with sequence parallelism: 4 all-gathers and 4 reduce-scatters.

    `gathered_again`: inputs that backward gathers once more, because only their part was saved: one for every
    column-parallel product whose input is treated so (attention's and the MLP's make 2 in a layer).
    """
    gathers = (4 + gathered_again) * ring_elements("all_gather", b * s * h, t)
    return gathers + 4 * ring_elements("reduce_scatter", b * s * h, t)


def ddp_elements() -> Expr:
    """Elements per step and rank that DDP, ZeRO-1 and ZeRO-2 move, for many ranks: an all-reduce of the gradients."""
    return sympy.limit(ring_elements("all_reduce", Psi, d), d, sympy.oo)


def fsdp_elements(*, per_micro_batch: bool = True) -> Expr:
    """Elements per step and rank under ZeRO-3 / FSDP, for many ranks and `m` micro-batches.

    Two gathers (forward, backward) per micro-batch unless parameters stay gathered, and one reduce-scatter; 3·Psi at
    m = 1.
    """
    gather = sympy.limit(ring_elements("all_gather", Psi, d), d, sympy.oo)
    scatter = sympy.limit(ring_elements("reduce_scatter", Psi, d), d, sympy.oo)
    return (2 * m if per_micro_batch else 1) * gather + scatter


def pipeline_elements(*, scatter_gather: bool = False, interleaved: bool = False) -> Expr:
    """Elements per boundary and micro-batch between pipeline stages, one direction."""
    return b * s * h / (t if scatter_gather else 1) * (v if interleaved else 1)


def pipeline_bubble(*, interleaved: bool = False) -> Expr:
    """Idle time over ideal time."""
    return (p - 1) / (m * v if interleaved else m)


def moe_all_to_all_elements() -> Expr:
    """Elements of a forward's dispatch and combine; (e - 1) / e of them leave the rank, and as many again backward."""
    return 2 * b * s * k * h


def moe_elements_sent() -> Expr:
    """Elements that leave a rank in forward."""
    return 2 * ring_elements("all_to_all", b * s * k * h, e)


def state_bytes_per_parameter(*, distributed_optimizer: bool = False) -> Expr:
    """bf16 parameter, fp32 gradient; fp32 master copy and two Adam states, these over `d` ranks where distributed."""
    return sympy.Integer(2 + 4) + sympy.Integer(4 + 8) / (d if distributed_optimizer else 1)


def activation_bytes_per_layer(mode: str = "none") -> Expr:
    """Saved activations of one layer, 16-bit with byte masks, scores kept (no flash attention).

    `mode`: "none" (one device), "tp", "tp+sp", "selective" (tp+sp, scores recomputed), "full" (layer input only).

    Raises:
        ValueError: an unknown mode.
    """
    forms = {
        "none": s * b * h * (34 + 5 * a * s / h),
        "tp": s * b * h * (10 + 24 / t + 5 * a * s / (h * t)),
        "tp+sp": s * b * h / t * (34 + 5 * a * s / h),
        "selective": 34 * s * b * h / t,
        "full": 2 * s * b * h,
    }
    if mode not in forms:
        raise ValueError(f"unknown mode {mode!r}; known are {', '.join(forms)}")
    return forms[mode]


def first_stage_activation_bytes(per_layer: Expr, *, interleaved: bool = False) -> Expr:
    """Activations of the first pipeline stage: p micro-batches in flight on L / p layers, whatever p."""
    return L * per_layer * (1 + (p - 1) / (p * v) if interleaved else 1)


def logits_bytes() -> Expr:
    """Logits in fp32, sharded over the vocabulary."""
    return 4 * s * b * V / t


def model_flops() -> Expr:
    """Model FLOPs of a GPT's training step of global batch `B`: forward and backward, attention not halved."""
    return 72 * B * L * s * h**2 * (1 + s / (6 * h) + V / (12 * h * L))


def hardware_flops() -> Expr:
    """FLOPs of the same step with full recompute of the layers."""
    return 96 * B * L * s * h**2 * (1 + s / (6 * h) + V / (16 * L * h))


def closed_forms() -> tuple[ClosedForm, ...]:
    """Every published form, with its source."""
    tp, zero = tp_elements_per_layer(), f"{ZERO} section 7"
    first = first_stage_activation_bytes(activation_bytes_per_layer("tp+sp"))
    return (
        ClosedForm("tp_per_layer", tp, "elements", f"{MEGATRON} section 3.2", "forward + backward, per micro-batch"),
        ClosedForm("tp_sp_per_layer", tp_sp_elements_per_layer(), "elements", RECOMPUTE, "as much as without SP"),
        ClosedForm(
            "tp_sp_per_layer_gathered_again",
            tp_sp_elements_per_layer(gathered_again=1),
            "elements",
            RECOMPUTE,
            "one all-gather more in backward per input that is not saved gathered",
        ),
        ClosedForm("ddp", ddp_elements(), "elements", zero, "ZeRO-1 and ZeRO-2 too"),
        ClosedForm("fsdp", fsdp_elements(), "elements", zero, "ZeRO-3; 3 Psi for one micro-batch"),
        ClosedForm("pipeline_boundary", pipeline_elements(), "elements", f"{MEGATRON} section 2.2"),
        ClosedForm(
            "pipeline_boundary_scatter_gather",
            pipeline_elements(scatter_gather=True),
            "elements",
            f"{MEGATRON} section 4.1",
        ),
        ClosedForm(
            "pipeline_boundary_interleaved", pipeline_elements(interleaved=True), "elements", f"{MEGATRON} section 2.2"
        ),
        ClosedForm("pipeline_bubble", pipeline_bubble(), "ratio", f"{MEGATRON} section 2.2"),
        ClosedForm(
            "pipeline_bubble_interleaved", pipeline_bubble(interleaved=True), "ratio", f"{MEGATRON} section 2.2"
        ),
        ClosedForm("moe_all_to_all", moe_all_to_all_elements(), "elements", "derived", "forward, dispatch and combine"),
        ClosedForm("moe_sent", moe_elements_sent(), "elements", "derived", "what of it leaves the rank"),
        ClosedForm(
            "state_per_parameter",
            state_bytes_per_parameter(),
            "bytes",
            "Megatron-LM theoretical_memory_usage.py",
            "bf16 parameter, fp32 gradient, Adam",
        ),
        ClosedForm(
            "state_per_parameter_distributed",
            state_bytes_per_parameter(distributed_optimizer=True),
            "bytes",
            "Megatron-LM theoretical_memory_usage.py",
        ),
        ClosedForm("activations", activation_bytes_per_layer("none"), "bytes", f"{RECOMPUTE} Eq 1", "one layer"),
        ClosedForm("activations_tp", activation_bytes_per_layer("tp"), "bytes", f"{RECOMPUTE} Eq 2"),
        ClosedForm("activations_tp_sp", activation_bytes_per_layer("tp+sp"), "bytes", f"{RECOMPUTE} Eq 4"),
        ClosedForm("activations_selective", activation_bytes_per_layer("selective"), "bytes", f"{RECOMPUTE} Eq 6"),
        ClosedForm("activations_full", activation_bytes_per_layer("full"), "bytes", f"{RECOMPUTE} Table 2"),
        ClosedForm("first_stage", first, "bytes", f"{RECOMPUTE} Eq 5"),
        ClosedForm(
            "first_stage_interleaved",
            first_stage_activation_bytes(activation_bytes_per_layer("tp+sp"), interleaved=True),
            "bytes",
            f"{RECOMPUTE} Eq 5",
        ),
        ClosedForm("logits", logits_bytes(), "bytes", f"{RECOMPUTE} section 4.3"),
        ClosedForm("model_flops", model_flops(), "flops", f"{RECOMPUTE} Eq 7"),
        ClosedForm("hardware_flops", hardware_flops(), "flops", f"{MEGATRON} Eq 3", "full recompute"),
    )


def ring_s() -> Expr:
    """Seconds of an all-gather or reduce-scatter on one kind of link; what `collectives.collective_s` computes."""
    part = S / n
    fill = part / (part + CHUNK_BYTES)
    return gamma + (n - 1) * (alpha + pi * fill) + (n - 1) * part / beta + COPY_PASSES * part / mu


def ring_all_reduce_s() -> Expr:
    """Seconds of a ring all-reduce on one kind of link: two passes, begun once, the own part copied once."""
    return 2 * ring_s() - gamma - COPY_PASSES * S / n / mu


def number(expression: Expr, values: Mapping[str | Expr, float]) -> float:
    """`expression` with `values` (by symbol or its name) filled in.

    Raises:
        ValueError: a symbol is left without a value.
    """
    by_name = {str(key): value for key, value in values.items()}
    left = sorted(str(symbol) for symbol in expression.free_symbols if str(symbol) not in by_name)
    if left:
        raise ValueError(f"no value for {', '.join(left)} in {expression}")
    return float(expression.subs({symbol: by_name[str(symbol)] for symbol in expression.free_symbols}))
