"""Results are written to by whoever gets them: gradients, and outputs that are copies, each in memory of its own."""

from __future__ import annotations

import pytest
import torch
from parity import captured, planned
from torch import fx, nn

from passes.lower.lower import lower
from passes.lower.partition import split


class Rows(nn.Module):
    """Two weights whose gradients are rows of one product, apart from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x @ torch.cat([self.upper, self.lower]).t()).square().mean()}


class Turned(nn.Module):
    """Two weights whose gradients are rows of one product, turned."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6, 5))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x @ torch.cat([self.left.t(), self.right.t()]).t()).square().mean()}


class Overlapping(nn.Module):
    """Four biases of one sum: two have one gradient, the third a part of it, the fourth another that overlaps."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8)
        self.head, self.tail = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = nn.functional.pad(self.head, (0, 3)) + nn.functional.pad(self.tail, (3, 0))
        return {"loss": (self.left(x) + self.right(x) + parts).tanh().mean()}


class Complex(nn.Module):
    """A complex weight's parts as two real parameters, and the sum of a parameter, whose gradient is what arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.again = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(6, 2))
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        turned = torch.view_as_complex(self.pairs) + torch.view_as_complex(self.again)
        return {"loss": (x * turned.abs()).mean() + self.scale}


@pytest.mark.parametrize(("model", "copies"), [(Rows, 0), (Turned, 0), (Overlapping, None), (Complex, None)])
def test_gradients_do_not_share_memory(model: type[nn.Module], copies: int | None) -> None:
    torch.manual_seed(0)
    program = captured(model(), {"x": torch.randn(4, 6)})
    backward = split(planned(program, {"dp": 1}, "auto")[2]).backward
    assert backward is not None
    clones = backward.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    assert copies is None or len(clones) == copies  # what shares nothing is not copied
    given = []
    for node in backward.graph.find_nodes(op="placeholder"):
        val = node.meta["val"]
        given.append(torch.empty_strided(val.shape, val.stride(), dtype=val.dtype).fill_(1))
    results = [result for result in fx.Interpreter(backward).run(*given) if result is not None]
    for number, result in enumerate(results, 2):
        result.fill_(number)
    assert [result.unique().tolist() for result in results] == [[n] for n in range(2, 2 + len(results))]
    assert all(value.unique().tolist() == [1] for value in given)


class Copies(nn.Module):
    """Copies of what it holds, is given, and returns under another name; views and tensors that are no copies."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.randn(6))
        self.table = torch.randn(6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h, weight = self.up(x), self.up.weight.detach()
        copy, kept = h.clone(), self.up(x + 1)
        return {
            "loss": h.sin().square().mean() + kept.sin().mean(),
            "h": h,
            "weight": weight * 1.0,
            "flat": (weight / 1).view(-1),
            "joined": torch.cat([weight]),
            "seen": self.seen.clone(),
            "itself": self.seen,
            "part": x.clone()[:, :3],
            "given": x.view(-1),
            "copy": copy,
            "again": copy,
            "other": h.clone(),
            "of what is kept": kept.clone(),
            "powers": weight.exp(),
            "equal": weight.exp(),
            "table": self.table.clone(),
        }


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("trains", [True, False])
def test_outputs_share_the_memory_that_eagers_share(trains: bool, compile: bool) -> None:
    torch.manual_seed(0)
    model, x = Copies(), torch.randn(4, 6)
    with torch.set_grad_enabled(trains):
        local = planned(captured(model, {"x": x}), {"dp": 1}, "ddp")[2]
    lowered = lower(local, compile=compile)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x}
    names = [entry.name for entry in local.inputs if entry.kind in ("parameter", "buffer", "input")]
    kept = {f"{name} of the step": named[name].detach().clone() for name in names}
    place = torch.tensor(0)
    for name in model(x):
        with torch.no_grad():
            eager = model(x)
            wanted = {**eager, "table of the model": model.table, **{f"{n} of the step": named[n] for n in names}}
            before = {n: value.detach().clone() for n, value in wanted.items()}
            eager[name].add_(1)
            moved = _moved(before, wanted)
            for n in names:
                named[n].copy_(kept[f"{n} of the step"])
        values = [kept[f"{n} of the step"].clone() for n in names]
        outputs, saved = lowered.forward([*values, place])
        found = {output.name: value for output, value in zip(local.outputs, outputs, strict=False)}
        found |= {f"{n} of the step": value for n, value in zip(names, values, strict=True)}
        ours, held = {n: value.clone() for n, value in found.items()}, [value.clone() for value in saved]
        found[name].add_(1)
        assert _moved(ours, found) == moved, name
        if moved == {name} and name != "h":
            assert all(map(torch.equal, held, saved)), name  # a copy is not what backward reads
        again = lowered.forward([*(kept[f"{n} of the step"] for n in names), place])[0]
        assert torch.equal(again[list(eager).index(name)], ours[name]), name


def test_outputs_that_are_no_copies_are_not_copied() -> None:
    program = captured(Overlapping(), {"x": torch.randn(4, 6)})
    forward = split(planned(program, {"dp": 1}, "ddp")[2]).forward
    assert not forward.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
