"""The commands as a user runs them: processes, or forks of one that has imported everything; and a folder to run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import forked
from schemas import conforms

from autopar.cli import main

ROOT = Path(__file__).parent.parent
MODELS = """
import torch
from torch import nn
from torch.nn import functional as F


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 96)

    def forward(self, ids, labels):
        x = self.embed(ids)
        x = x + self.down(F.gelu(self.up(x)))
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def build():
    ids = torch.randint(0, 96, (4, 16))
    return Tiny(), {"ids": ids, "labels": ids}


def wider():
    model, inputs = build()
    model.up, model.down = nn.Linear(32, 256), nn.Linear(256, 32)
    return model, inputs


def number():
    return 3


def fails():
    return build()[0].nothing


def no_inputs():
    return Tiny()


def nothing():
    pass


def leaves():
    raise SystemExit(0)


def three():
    return Tiny(), {}, {}


def wants(size):
    return build()


def too_long():
    return build()[0], {"ids": torch.zeros(4, 16, dtype=torch.long), "labels": torch.zeros(4, 8, dtype=torch.long)}


def talks():
    print("made by hand")
    return build()


def branches():
    class Branch(Tiny):
        def forward(self, ids, labels):
            out = super().forward(ids, labels)
            return out if out["loss"] > 1 else None

    return Branch(), build()[1]


class Weighed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x, weight):
        return (self.up(x) @ weight).square().mean()


def weighed():
    return Weighed(), {"x": torch.randn(4, 8), "weight": torch.randn(8, 3)}


def unclear():
    return Weighed(), {"x": torch.randn(3, 8), "weight": torch.randn(8, 3)}
"""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        found = json.loads(self.out)
        conforms(found)
        return found


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def started(*arguments: object) -> Ran:
    """`python -m autopar ...`, from the start of Python on."""
    command = [sys.executable, "-m", "autopar", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200)
    return Ran(done.returncode, done.stdout, done.stderr)


def autopar(*arguments: object) -> Ran:
    """The same in a process that has imported everything."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        code = forked(command, [str(each) for each in arguments], str(out), str(err), environment())
        return Ran(code, out.read_text("utf-8"), err.read_text("utf-8"))


def command(words: list[str], out: str, err: str, environment: dict[str, str]) -> int:
    """Exit code of the command, whose standard output and error go to these files."""
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


@dataclass(frozen=True)
class Here:
    """A folder with models, and two plans for one of them."""

    folder: Path
    model: str
    plan: Path
    other: Path
    planned: Ran
    as_json: Ran


def made_here(folder: Path) -> Here:
    """A `Here` in `folder`."""
    (folder / "models.py").write_text(MODELS, encoding="utf-8")
    model = f"{folder}/models.py:build"
    plan, other = folder / "plan.json", folder / "other.json"
    on = ("plan", model, "--mesh", "dp=2,tp=2", "--hardware", "h100")
    planned = autopar(*on, "-o", plan, "--html", folder / "report.html", "--trace", folder / "step.json")
    as_json = autopar(*on, "--strategy", "fsdp", "--json", "-o", other)
    edit(plan, folder / "edited.json", "up.weight", at_rest="RS(0)", in_compute="RS(0)")
    (folder / "bytes.json").write_bytes(b"\xd8\x00\xff")
    (folder / "deep.json").write_text("[" * 10**5, encoding="utf-8")
    figures = {"format": "autopar-hardware", "version": 2, "base": "h100", "hardware": {}}
    (folder / "hardware.json").write_text(json.dumps(figures), encoding="utf-8")
    (folder / "heads").mkdir()
    (folder / "heads" / "config.json").write_text('{"model_type": "llama", "hidden_size": 30}', encoding="utf-8")
    (folder / "clip.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    seeing = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_hidden_layers": 2}
    (folder / "seeing.json").write_text(json.dumps(seeing), encoding="utf-8")
    (folder / "wordless.json").write_text('{"model_type": "llama", "vocab_size": 0}', encoding="utf-8")
    (folder / "kindless.json").write_text('{"model_type": 5}', encoding="utf-8")
    (folder / "numbered.json").write_text('{"model_type": "llama", "architectures": [3]}', encoding="utf-8")
    edit(plan, folder / "misspelt.json", "up.weight", in_compute="RQ")
    edit(plan, folder / "short.json", "up.weight", in_compute="R")
    text = plan.read_text(encoding="utf-8")
    step = f'"step_time_s": {json.loads(text)["step_time_s"]!r}'
    for name, old, new in (
        ("renamed", '"up.weight": {', '"up.wieght": {'),
        ("unknown", '"seed":', '"seeds":'),
        ("newer", '"version": 1', '"version": 2'),
        ("budget", '"memory_budget": null', '"memory_budget": "much"'),
        ("recompute", '"recompute": "auto"', '"recompute": "some"'),
        ("accumulate", '    "accumulate": 1', '    "accumulate": "2"'),
        ("negative", step, '"step_time_s": -1.0'),
        ("nan", step, '"step_time_s": NaN'),
        ("pins", '"pins": {}', '"pins": [3]'),
        ("policy", '"mp_policy": null', '"mp_policy": "bf16"'),
        ("inputs", '"example": "{', '"example": "'),
        ("batch-axes", '"batch_axes": ["dp"]', '"batch_axes": ["pp"]'),
        ("no-batches", '"accumulate": 1', '"accumulate": 0'),
        ("no-ranks", '["dp", 2]', '["dp", 0]'),
        ("other-inputs", f'"example": {json.dumps(json.loads(text)["example"])}', '"example": "{\\"a\\": 1}"'),
    ):
        assert old in text
        (folder / f"{name}.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    edit(plan, folder / "edited-badly.json", "up.bias", at_rest="RR", in_compute="RS(1)")
    return Here(folder, model, plan, other, planned, as_json)


def edit(plan: Path, to: Path, parameter: str, **changed: object) -> None:
    """What a person does in an editor: other values on the line of one parameter."""
    lines = plan.read_text(encoding="utf-8").splitlines()
    (number,) = (n for n, line in enumerate(lines) if line.startswith(f'    "{parameter}": {{'))
    head, _, body = lines[number].partition(": ")
    entry = json.loads(body.rstrip(",")) | changed
    lines[number] = f"{head}: {json.dumps(entry)}{',' if body.endswith(',') else ''}"
    to.write_text("\n".join(lines) + "\n", encoding="utf-8")
