"""Random small Transformers on random meshes under random strategies, all ranks simulated, against eager.

HYPOTHESIS_PROFILE=hundreds pytest --timeout 7200 tests/test_random_transformers.py      # 400 of them
"""

from __future__ import annotations

import torch
from hypothesis import event, example, given, note, settings
from hypothesis import strategies as st
from parity import captured, planned, relative
from random_plans import every_option, random_plan
from random_transformers import Sketch, build, sketches
from torch import Tensor, fx, nn

from passes.parity.simulate import StepValues, simulate_step
from passes.program.local import LocalProgram
from passes.program.program import Program
from passes.tokens.routing import token_parts
from passes.tokens.token_blocks import by_blocks

SEED = (7, 3)
EXAMPLES = 400 if settings.get_current_profile_name() == "hundreds" else 10
MESHES: dict[str, dict[str, int]] = {
    "2": {"dp": 2},
    "4": {"dp": 4},
    "x2": {"tp": 2},
    "x4": {"tp": 4},
    "2x2": {"dp": 2, "tp": 2},
    "2x3": {"dp": 2, "tp": 3},
    "4x2": {"dp": 4, "tp": 2},
    "2+2": {"dp_replicate": 2, "dp_shard": 2},
    "2x2x2": {"dp_replicate": 2, "dp_shard": 2, "tp": 2},
    "2x2x2t": {"dp": 2, "tp": 2, "ep": 2},
}


def _tangents(program: Program, model: nn.Module, values: dict[str, Tensor]) -> list[Tensor] | None:
    """Of logits that the user makes a loss of, random ones; that of a loss is 1."""
    if program.has_loss:
        return None
    generator = torch.Generator().manual_seed(1)
    shapes = [node.meta["val"].shape for node in program.graph.graph.find_nodes(op="placeholder")]
    wanted = [shape for shape, one in zip(shapes, program.inputs, strict=True) if one.kind == "tangent"]
    return [torch.randn(shape, generator=generator) for shape in wanted]


def _eager(model: nn.Module, kwargs: dict[str, Tensor], tangents: list[Tensor] | None) -> StepValues:
    """The unmodified model's step; its buffers are put back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    out = model(**kwargs)
    outputs = {"": out} if isinstance(out, Tensor) else out
    if tangents is None:
        outputs["loss"].backward()
    elif tangents:
        out.backward(tangents[0])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.equal(before[name])}
    for name, buffer in model.named_buffers():
        buffer.data.copy_(before[name])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return StepValues({name: x.detach() for name, x in outputs.items()}, buffers, gradients)


def _through_graph(
    program: Program, model: nn.Module, kwargs: dict[str, Tensor], tangents: list[Tensor] | None
) -> StepValues:
    """The captured graph on one device: what a step that draws random numbers is held against."""
    known = dict(model.named_parameters()) | dict(model.named_buffers()) | kwargs
    left = iter(tangents or [torch.ones(())])
    values = [
        torch.tensor(SEED) if one.kind == "seed" else next(left) if one.kind == "tangent" else known[one.name].detach()
        for one in program.inputs
    ]
    found = StepValues({}, {}, {})
    for out, value in zip(program.outputs, fx.Interpreter(program.graph).run(*values), strict=True):
        {"output": found.outputs, "buffer": found.buffers, "gradient": found.gradients}[out.kind][out.name] = value
    return found


def _laid_out(program: Program, mesh: dict[str, int], strategy: str, seed: int) -> LocalProgram:
    batch_axes = tuple(i for i, name in enumerate(mesh) if name.startswith("dp"))
    if strategy != "random":
        return planned(program, mesh, strategy, batch_axes)[2]
    routed = by_blocks(program, token_parts(program, strategy, list(mesh.values()), batch_axes))
    return random_plan(every_option(routed, mesh, batch_axes), seed)[1]


def _compare(found: StepValues, wanted: StepValues) -> None:
    """Outputs and buffers to 1e-5; gradients to 1e-3 of their norm, or to rounding of all gradients' norm."""
    assert set(found.outputs) == set(wanted.outputs)
    assert set(found.gradients) == set(wanted.gradients)
    assert set(wanted.buffers) <= set(found.buffers)
    for name, value in wanted.outputs.items():
        assert relative(found.outputs[name], value) < 1e-5, name
    for name, value in wanted.buffers.items():
        assert relative(found.buffers[name], value) < 1e-5, name
    total = sum(float(g.double().square().sum()) for g in wanted.gradients.values()) ** 0.5
    for name, value in wanted.gradients.items():
        error = relative(found.gradients[name], value)
        assert error < 1e-3 or error * float(value.norm()) < 1e-5 * total, (name, error)


@example(Sketch(layers=2, dropout=0.3), "2x2", "megatron")  # layers share a decision, not their masks
@settings(max_examples=EXAMPLES)
@given(sketches(), st.sampled_from(sorted(MESHES)), st.sampled_from(["auto", "ddp", "fsdp", "megatron", "random"]))
def test_any_transformer_on_any_mesh(sketch: Sketch, mesh: str, strategy: str) -> None:
    check(sketch, mesh, strategy)


def check(sketch: Sketch, mesh: str, strategy: str) -> None:
    """The step of all ranks is eager's; with dropout, the captured graph's, and eager's without it in eval mode."""
    event(strategy)
    model, kwargs = build(sketch)
    program = captured(model, kwargs)
    local = _laid_out(program, MESHES[mesh], strategy, sketch.seed)
    for line in local.program.notes:
        note(line)
    tangents = _tangents(program, model, kwargs)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = simulate_step(local, parameters, dict(model.named_buffers()), list(kwargs.values()), tangents, seed=SEED)
    random = any(one.kind == "seed" for one in program.inputs)
    wanted = _through_graph(program, model, kwargs, tangents) if random else _eager(model, kwargs, tangents)
    _compare(found, wanted)
