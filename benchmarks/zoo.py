"""Every architecture of `transformers`, tiny, trained a step on four ranks beside one device.

    python benchmarks/zoo.py                              all of zoo.csv: 75 CPU minutes
    python benchmarks/zoo.py --resume                     those that the result file lacks
    python benchmarks/zoo.py --only llama,t5@s2s          some, by name
    python benchmarks/zoo.py --others --simulate --out zoo_of_others.csv      all that zoo.csv does not list
    python benchmarks/zoo.py --failed                     those that failed, again
    python benchmarks/zoo.py --simulate                   all ranks played in one process: a fifth of the time
    python benchmarks/zoo.py --simulate --tp 3 --out zoo_of_three.csv     no dim is even

Mesh dp=2 x tp=2, float32, not compiled, real gloo ranks, by the stages of `autopar.plan` and `autopar.apply`, under
`megatron`, `fsdp` and `auto`. Each rank captures a model once. A step is right where the loss is eager's on one device
with the whole batch to 1e-4 and every gradient to 2e-3 of its norm. (A gradient whose norm is under 1e-6 of all
gradients' is zero but for rounding, and is held against that. One that is off still is held against what eager's own
gradient is off float64's, four times over: a bias before a norm has a gradient that is nothing but rounding.)

With `--simulate` the same plans and programs run in one process per architecture, collectives being plain arithmetic.

Four processes stay alive over many models, so that imports are paid once. One that crashes, hangs or fails has all
four started again. Each finished row goes to `zoo_results.csv` at once; `zoo_results.md` is made from it.

A step is run once per plan: where `auto` finds the plan of a named strategy, its row says whose run it is (`same_as`).

Columns: `split` is the share of a rank's multiply-adds (products, attention, convolutions) that the tp axis splits,
counted in the emitted program: 1 where each of two ranks does half, 0 where both do all.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

FOLDER = Path(__file__).parent
STRATEGIES = ("megatron", "fsdp", "auto")
Mesh = tuple[tuple[str, int], ...]
MESH: Mesh = (("dp", 2), ("tp", 2))
RANKS = math.prod(size for _, size in MESH)
LOSS_LIMIT, GRADIENT_LIMIT, ZERO = 1e-4, 2e-3, 1e-6
TIMES_ROUNDING = 4
COMMAND = "python benchmarks/zoo.py"


@dataclass
class Row:
    """One architecture under one strategy."""

    architecture: str
    family: str
    strategy: str
    captured: bool = False
    planned: bool = False
    ran: bool = False
    right: bool = False
    loss_error: float = math.nan
    gradient_error: float = math.nan
    worst: str = ""
    """The parameter of the worst gradient."""
    split: float = math.nan
    replicated: str = ""
    """Ops that ran whole on every rank for want of a rule."""
    notes: str = ""
    seconds: float = 0.0
    ranks: str = "real"
    """Or "simulated"."""
    same_as: str = ""
    """The strategy whose plan this one's is; it ran once for both."""
    error: str = ""


# --------------------------------------------------------------------------------------------------------- on each rank
def serve(rank: int, folder: str, jobs: Any, threads: int) -> None:
    """A rank: takes names of architectures, gives rows of results, until there are no more."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(minutes=20)
    )
    mesh = init_device_mesh("cpu", tuple(n for _, n in MESH), mesh_dim_names=tuple(name for name, _ in MESH))
    jobs.send(None)
    while (job := jobs.recv()) is not None:
        name, family, strategies = job
        rows = _rows(name, family, strategies, mesh, rank)
        jobs.send((rows, _are_apart(rows)))
    dist.destroy_process_group()


def _rows(name: str, family: str, strategies: tuple[str, ...], mesh: Any, rank: int) -> list[Row]:
    rows = [Row(name, family, strategy) for strategy in strategies]
    try:
        step = _Step.of(name, mesh.get_local_rank("dp"), whole=rank == 0)
    except Exception as error:
        for row in rows:
            row.error = f"eager: {_told(error)}"
        return rows
    for row in rows:
        start = time.monotonic()
        try:
            with mock.patch.multiple("autopar.planning", **step.planning):
                _run(row, step, mesh, rank)
        except Exception as error:
            if os.environ.get("ZOO_TRACEBACK"):
                traceback.print_exc()
            row.error = _told(error)
            row.seconds = time.monotonic() - start
            break
        row.seconds = time.monotonic() - start
    return rows


def _are_apart(rows: list[Row]) -> bool:
    """Whether an error may have left this rank elsewhere than others: what planning finds wrong, all ranks raise."""
    raised = next((row for row in rows if row.error and not row.right and not math.isfinite(row.loss_error)), None)
    return raised is not None and (raised.planned or raised.error.startswith("eager"))


@dataclass
class _Step:
    """A model, this rank's part of the batch and all of it, and what eager gives for that."""

    model: Any
    inputs: dict[str, Any]
    whole: dict[str, Any]
    loss: float
    gradients: dict[str, Any]
    rounding: Callable[[], dict[str, float]]
    """How far eager's own gradients are from those of float64, by name; worked out where it is asked for."""
    planning: dict[str, Callable[..., Any]]
    """autopar's own stages, but that this rank captures the step once, not twice for each strategy, and that what is
    solved for one strategy is there for the next."""
    ran: list[tuple[Any, Row]] = field(default_factory=list)
    """Plans that were run, and how that went."""

    @staticmethod
    def of(name: str, part: int, whole: bool) -> _Step:
        import torch
        import zoo_models

        from autopar import planning

        model, inputs = zoo_models.build(name)
        loss, gradients = math.nan, {}
        if whole:
            # A model of its own: a forward may change buffers.
            reference, _ = zoo_models.build(name)
            found = zoo_models.loss_of(reference(**inputs))
            found.backward()
            loss = float(found)
            gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        parts = dict(MESH)["dp"]
        local = {k: v.chunk(parts)[part] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        stages = {"captured": _once(planning.captured), "planned": partial(planning.planned, known={})}
        rounding = cache(partial(_rounding, name, gradients))
        return _Step(model, local, inputs, loss, gradients, rounding, stages)


def _rounding(name: str, gradients: dict[str, Any]) -> dict[str, float]:
    """The norm of eager's error in each of `gradients`, against float64; {} where a model has no step in that."""
    import torch
    import zoo_models

    model, inputs = zoo_models.build(name)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    try:
        zoo_models.loss_of(model.double()(**wide)).backward()
    except RuntimeError:
        return {}
    exact = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: float((g.double() - exact[n]).norm()) for n, g in gradients.items()}


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make` of one call of the model; a program of one kind, once made, is given again."""
    made: dict[tuple[Any, Any], Any] = {}

    def first(*args: Any, tangents: Any = "loss", backward: bool = True, **kwargs: Any) -> Any:
        kind = tangents, backward
        if kind not in made:
            made[kind] = make(*args, tangents=tangents, backward=backward, **kwargs)
        return made[kind]

    return first


def _run(row: Row, step: _Step, mesh: Any, rank: int) -> None:
    import zoo_models

    import autopar

    options = autopar.Options(compile=False, progress=False)
    plan = autopar.plan(step.model, mesh, step.inputs, strategy=row.strategy, options=options)
    row.captured = row.planned = True
    _note(row, plan.notes)
    for other, earlier in step.ran:
        if replace(plan, bound=other.bound) == other:
            row.ran, row.right, row.error, row.same_as = earlier.ran, earlier.right, earlier.error, earlier.strategy
            row.loss_error, row.gradient_error, row.worst = earlier.loss_error, earlier.gradient_error, earlier.worst
            row.split = earlier.split
            return
    step.ran.append((plan, row))
    module = autopar.apply(step.model, plan, mesh)
    loss = zoo_models.loss_of(module(**step.inputs))
    loss.backward()
    row.ran = True
    found = {n: p.grad.full_tensor() for n, p in module.named_parameters() if p.grad is not None}
    if rank:
        return
    (executables,) = module.__dict__["_autopar"].executables.values()
    row.split = _split(executables[0].local, MESH)
    _compare(row, step, float(loss), found)


def _note(row: Row, notes: tuple[str, ...]) -> None:
    missing = "no rule for "
    row.replicated = "; ".join(n.removeprefix(missing).partition(":")[0] for n in notes if n.startswith(missing))
    row.notes = "; ".join(n for n in notes if not n.startswith(missing) and "padded" not in n)


def _compare(row: Row, step: _Step, loss: float, gradients: dict[str, Any]) -> None:
    row.loss_error = abs(loss - step.loss) / abs(step.loss)
    row.gradient_error, row.worst = _worst(gradients, step.gradients)
    if GRADIENT_LIMIT < row.gradient_error < math.inf:
        row.gradient_error, row.worst = _worst(gradients, step.gradients, step.rounding())
    row.right = row.loss_error <= LOSS_LIMIT and row.gradient_error <= GRADIENT_LIMIT
    if not row.right:
        row.error = f"other numbers: loss {row.loss_error:.1e}, gradient {row.gradient_error:.1e} of {row.worst}"


def _worst(
    found: dict[str, Any], wanted: dict[str, Any], rounding: Mapping[str, float] = MappingProxyType({})
) -> tuple[float, str]:
    """The largest error of a gradient over `TIMES_ROUNDING` of eager's own, relative to its norm, and whose it is."""
    total = math.sqrt(sum(float(g.double().square().sum()) for g in wanted.values()))
    worst, name = 0.0, ""
    for key in dict.fromkeys([*wanted, *found]):
        a, b = found.get(key), wanted.get(key)
        if a is None or b is None:
            error = 0.0 if float((b if a is None else a).norm()) == 0 else math.inf
        else:
            apart = float((a.double() - b.double()).norm())
            allowed = TIMES_ROUNDING * rounding.get(key, 0.0)
            over = 0.0 if apart <= allowed else apart - allowed
            error = over / max(float(b.double().norm()), ZERO * total)
        if math.isnan(error):
            return error, key
        if error > worst:
            worst, name = error, key
    return worst, name


def _split(local: Any, mesh: Mesh) -> float:
    """Share of the multiply-adds of a rank's program that the tp axis splits."""
    experts = max((n.args[1].meta["val"].shape[0] for n in _calls(local.program.graph) if _is_grouped(n)), default=1)
    whole, mine = (sum(_of_node(n, experts) for n in _calls(graph)) for graph in (local.program.graph, local.graph))
    if not whole:
        return math.nan
    sizes = dict(mesh)
    of_rank = mine * sizes["dp"] / whole
    return (1 - of_rank) / (1 - 1 / sizes["tp"])


def _calls(gm: Any) -> list[Any]:
    return [node for node in gm.graph.nodes if node.op == "call_function"]


def _is_grouped(node: Any) -> bool:
    return "grouped_mm" in str(node.target)


def _of_node(node: Any, experts: int) -> float:
    import torch
    from torch import fx
    from torch.utils.flop_counter import conv_backward_flop, conv_flop

    target = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    shape = [tuple(x.shape) if isinstance(x, torch.Tensor) else () for x in args]
    name = str(target)
    if name in ("aten.mm.default", "aten.bmm.default"):
        return math.prod(shape[0]) * shape[1][-1]
    if "scaled_dot_product" in name:
        backward = "backward" in name
        query, key = (shape[1], shape[2]) if backward else (shape[0], shape[1])
        return math.prod(query) * key[2] * (5 if backward else 2)
    if "grouped_mm" in name:
        # Which rows are a rank's own depends on data: on average, as many of them as it has of the experts.
        return math.prod(shape[0]) * shape[1][-1] * shape[1][0] / experts * (2 if "backward" in name else 1)
    if name == "aten.convolution.default":
        return float(conv_flop(*args, **kwargs, out_val=node.meta["val"])) / 2
    if name == "aten.convolution_backward.default":
        return float(conv_backward_flop(*args, **kwargs, out_val=node.meta["val"])) / 2
    return 0.0


def _told(error: Exception) -> str:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"[^ ]*/site-packages/", "", words)[:600]


# ------------------------------------------------------------------------------------------------- ranks in one process
def simulated(name: str, family: str, strategies: tuple[str, ...], mesh: Mesh, answer: Any, threads: int) -> None:
    """Sends rows for an architecture whose ranks are all played here; run in a process of its own."""
    import torch
    from torch.utils import _pytree as pytree

    from autopar import planning
    from autopar.api import skeleton
    from autopar.options import Options
    from passes.capture.inputs import global_inputs
    from passes.parity.simulate import simulate_step

    torch.set_num_threads(threads)
    rows = [Row(name, family, strategy, ranks="simulated") for strategy in strategies]
    stage = "eager"
    try:
        step = _Step.of(name, 0, whole=True)
        stage = ""
        ways = dict(mesh)["dp"]
        whole = global_inputs((), dict(sorted(step.inputs.items())), ways, None)
        program = planning.captured(
            skeleton(step.model), whole.args, whole.kwargs, batch_dims=whole.batch_dims, batch_size=whole.batch_size
        )
        values = {name: step.whole[name] for name in whole.kwargs}
        tensors = [leaf for leaf in pytree.tree_leaves(((), values)) if isinstance(leaf, torch.Tensor)]
        parameters = {n: p.detach() for n, p in step.model.named_parameters()}
        known: dict[str, Any] = {}
        for row in rows:
            start = time.monotonic()
            row.captured = True
            plan = planning.planned(
                program, mesh, batch_axes=(0,), hardware=None, strategy=row.strategy, options=Options(compile=False),
                example="", known=known,
            )  # fmt: skip
            row.planned = True
            _note(row, plan.notes)
            local = planning.rewritten(program, plan)
            found = simulate_step(local, parameters, dict(step.model.named_buffers()), tensors, None, (0, 0))
            row.ran = True
            row.split = _split(local, mesh)
            _compare(row, step, float(found.outputs["loss"]), found.gradients)
            row.seconds = time.monotonic() - start
            if row.error:
                break
    except Exception as error:
        if os.environ.get("ZOO_TRACEBACK"):
            traceback.print_exc()
        next(row for row in rows if not row.right).error = f"{stage}: {_told(error)}" if stage else _told(error)
    answer.send(rows)


def simulate(
    name: str, family: str, strategies: tuple[str, ...], mesh: Mesh, limit_s: float, threads: int
) -> tuple[list[Row], bool]:
    """Rows of `simulated`, run in a process of its own that may crash or hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "zoo_models", "autopar"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=simulated, args=(name, family, strategies, mesh, theirs, threads), daemon=True)
    process.start()
    theirs.close()
    rows = [Row(name, family, strategy, ranks="simulated") for strategy in strategies]
    try:
        if ours.poll(limit_s):
            rows = ours.recv()
        else:
            rows[0].error = f"not done after {limit_s:.0f} s"
    except EOFError:
        rows[0].error = "the process died"
    process.kill()
    process.join()
    return rows, True


# ------------------------------------------------------------------------------------------------------- the four ranks
class Ranks:
    """Four processes that run one architecture after another."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.mkdtemp(prefix="zoo")
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.folder, theirs, threads), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def run(self, name: str, family: str, strategies: tuple[str, ...], limit_s: float) -> tuple[list[Row], bool]:
        """Rows, and whether the ranks are still good for another."""
        start = time.monotonic()
        deadline = start + limit_s
        for pipe in self.pipes:
            pipe.send((name, family, strategies))
        said: dict[int, Any] = {}
        while len(said) < RANKS and (left_s := deadline - time.monotonic()) > 0:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in said]
            for pipe in multiprocessing.connection.wait(waiting, timeout=left_s):
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    said[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    said[rank] = None
                if said[rank] is None or said[rank][1]:
                    deadline = min(deadline, time.monotonic() + 30)  # the others may wait for it for ever
        good = len(said) == RANKS and not any(answer is None or answer[1] for answer in said.values())
        rows = said[0][0] if said.get(0) else [Row(name, family, strategy) for strategy in strategies]
        if not good or any(row.error for row in rows):
            self._explain(rows, said, time.monotonic() - start)
        return rows, good

    def _explain(self, rows: list[Row], said: dict[int, Any], waited_s: float) -> None:
        """Give the row that failed the words of the rank that knows why."""
        row = next((row for row in rows if row.error or not row.ran), None)
        if row is None:
            return
        told = [r.error for answer in said.values() if answer for r in answer[0] if r.error]
        own = [text for text in told if not text.startswith("RankFailedError")]
        silent = [rank for rank in range(RANKS) if rank not in said]
        dead = [rank for rank, answer in said.items() if answer is None]
        if own and "other numbers" not in (row.error or own[0]):
            row.error = own[0]
        elif dead:
            row.error = f"rank {dead[0]} died"
        elif silent and not row.error:
            row.error = f"no word from ranks {silent} for {waited_s:.0f} s"
        if "CaptureError" not in row.error and row.error and not row.error.startswith("eager"):
            row.captured = True

    def stop(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- results
def read(path: Path) -> dict[tuple[str, str], Row]:
    """Rows of an earlier run by architecture and strategy."""
    if not path.exists():
        return {}
    rows = {}
    with path.open() as file:
        for record in csv.DictReader(file):
            values: dict[str, Any] = {}
            for column in fields(Row):
                values[column.name] = _value(str(column.type), record.get(column.name, ""))
            rows[record["architecture"], record["strategy"]] = Row(**values)
    return rows


def _value(kind: str, text: str) -> Any:
    if kind == "float":
        return float(text) if text else math.nan
    return text == "yes" if kind == "bool" else text


def write(path: Path, rows: dict[tuple[str, str], Row]) -> None:
    """All rows, sorted."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column.name for column in fields(Row)])
        for _, row in sorted(rows.items()):
            writer.writerow([_cell(value) for value in asdict(row).values()])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return str(value)


def summary(rows: dict[tuple[str, str], Row], asked: int, mesh: Mesh = MESH) -> str:
    """Markdown: counts, what failed and why, and a line per architecture."""
    import torch
    import transformers
    from tabulate import tabulate

    names = sorted({name for name, _ in rows})
    low = [[n, f"{row.split:.2f}"] for n in names if (row := rows.get((n, "megatron"))) is not None and row.split < 0.9]
    wrong = [[r.architecture, r.strategy, r.error.replace("|", "\\|")] for _, r in sorted(rows.items()) if not r.right]
    missing = Counter(op for row in rows.values() if row.strategy == "megatron" for op in row.replicated.split("; "))
    del missing[""]
    head = ["strategy", "run", "captured", "planned", "ran", "right", "", "split: median", "lowest"]
    columns = ["architecture", "family"]
    for strategy in STRATEGIES:
        columns += [f"{strategy}: loss", "gradient", "split"]
    text = [
        "# Every architecture, sharded",
        "",
        f"Made by `{COMMAND}`; torch {torch.__version__}, transformers {transformers.__version__}. {len(names)} of "
        f"{asked} architectures have been run ({_kinds(rows)}) on mesh {' x '.join(f'{n}={s}' for n, s in mesh)}, "
        "float32, not compiled: real steps on four gloo ranks by the stages of `autopar.plan` and `autopar.apply` "
        "(each rank captures a model once; where `auto` finds the plan of a named strategy, one run counts for both), "
        "simulated ones with all ranks in one process (`--simulate`). Errors are relative to eager on one device with "
        f"the whole batch: right is a loss to {LOSS_LIMIT:g} and every gradient to {GRADIENT_LIMIT:g} of its norm. "
        "`split` is the share of a rank's multiply-adds that the tp axis splits. `zoo_results.csv` has all columns.",
        "",
        tabulate([_counted(strategy, rows) for strategy in STRATEGIES], head, "github"),
        "",
        "## What fails, and why",
        "",
        tabulate(wrong, ["architecture", "strategy", "error"], "github") if wrong else "Nothing.",
        "",
        "## Products that tp does not split under megatron",
        "",
        tabulate(low, ["architecture", "split"], "github") if low else "None under 0.9.",
        "",
        "## Ops that run whole on every rank, for want of a rule",
        "",
        tabulate(missing.most_common(), ["op", "architectures"], "github") if missing else "None.",
        "",
        "## Each architecture",
        "",
        tabulate([_line(name, rows) for name in names], columns, "github", disable_numparse=True),
        "",
    ]
    return "\n".join(text)


def _counted(strategy: str, rows: dict[tuple[str, str], Row]) -> list[Any]:
    """A line of counts: how many architectures got how far under a strategy, and how much of them tp splits."""
    mine = [row for (_, of), row in rows.items() if of == strategy]
    split = sorted(row.split for row in mine if not math.isnan(row.split)) or [math.nan]
    right = sum(row.right for row in mine)
    reached = [sum(r.captured for r in mine), sum(r.planned for r in mine), sum(r.ran for r in mine)]
    share = f"{right / max(1, len(mine)):.1%}"
    return [strategy, len(mine), *reached, right, share, f"{split[len(split) // 2]:.2f}", f"{split[0]:.2f}"]


def _line(name: str, rows: dict[tuple[str, str], Row]) -> list[str]:
    """An architecture's errors and split under each strategy."""
    found = [rows.get((name, strategy)) for strategy in STRATEGIES]
    line = [name, next(row.family for row in found if row is not None)]
    for row in found:
        if row is None:
            line += ["", "", ""]
        elif not row.ran:
            line += ["failed", "", ""]
        else:
            line += [f"{row.loss_error:.0e}", f"{row.gradient_error:.0e}", f"{row.split:.2f}"]
    return line


def _kinds(rows: dict[tuple[str, str], Row]) -> str:
    counts = Counter(row.ranks for row in rows.values())
    return ", ".join(f"{count} steps on {kind} ranks" for kind, count in sorted(counts.items()))


def _families() -> dict[str, str]:
    """Architectures in `zoo.csv` and what kind they are of."""
    with (FOLDER / "zoo.csv").open() as file:
        return {record["name"]: record["family"] for record in csv.DictReader(file)}


def _asked(arguments: argparse.Namespace) -> list[str]:
    """All that may be run: those in `zoo.csv`, or with `--others` every other one that `transformers` has."""
    if not arguments.others:
        return list(_families())
    import zoo_models

    every = [f"{kind}@{task}" if task else kind for task, kinds in zoo_models.TASKS.items() for kind in kinds]
    return [name for name in every if name not in _families()]


def _chosen(
    arguments: argparse.Namespace, rows: dict[tuple[str, str], Row]
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(architecture, family, strategies to run)."""
    listed = _families()
    names = arguments.only.split(",") if arguments.only else _asked(arguments)
    for name in names:
        strategies = tuple(arguments.strategies.split(","))
        if arguments.resume:
            known = {key for key, row in rows.items() if arguments.simulate or row.ranks == "real"}
            strategies = tuple(s for s in strategies if (name, s) not in known)
        if arguments.failed:
            strategies = tuple(s for s in strategies if (name, s) in rows and not rows[name, s].right)
        if strategies:
            yield name, listed.get(name, ""), strategies


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--others", action="store_true", help="what zoo.csv does not list; give --out")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--resume", action="store_true", help="skip what the result file has")
    parser.add_argument("--failed", action="store_true", help="run again what the result file has as failed")
    parser.add_argument("--limit-s", type=float, default=600, help="for one architecture, all strategies")
    parser.add_argument("--threads", type=int, default=1, help="per rank")
    parser.add_argument("--out", type=Path, default=FOLDER / "zoo_results.csv")
    parser.add_argument("--simulate", action="store_true", help="play all ranks in one process")
    parser.add_argument("--tp", type=int, default=dict(MESH)["tp"], help="ranks of the tensor axis, with --simulate")
    parser.add_argument("--no-run", action="store_true", help="only make the .md from the .csv")
    arguments = parser.parse_args()
    another_mesh = arguments.tp != dict(MESH)["tp"]
    if another_mesh and not arguments.simulate:
        parser.error("--tp goes with --simulate: there are four ranks")
    if (arguments.others or another_mesh) and arguments.out == parser.get_default("out"):
        parser.error("--tp and --others: give --out, as the results kept are of another mesh and of zoo.csv")
    return arguments


def _tell(place: str, row: Row) -> None:
    told = row.error or f"loss {row.loss_error:.0e}, gradient {row.gradient_error:.0e}"
    what = f"{row.architecture:32} {row.strategy:9} {'ok  ' if row.right else 'FAIL'}"
    print(f"{place} {what} split {row.split:4.2f} {row.seconds:5.1f} s  {told}", flush=True)


def main() -> int:
    arguments = _arguments()
    mesh: Mesh = (*MESH[:-1], ("tp", arguments.tp))
    keep = arguments.resume or arguments.failed or arguments.only or arguments.no_run
    rows = read(arguments.out) if keep else {}
    jobs = [] if arguments.no_run else list(_chosen(arguments, rows))
    ranks: Ranks | None = None
    for done, (name, family, strategies) in enumerate(jobs):
        left = strategies
        while left:  # a strategy that fails does not take the next ones with it
            if arguments.simulate:
                found, good = simulate(name, family, left, mesh, arguments.limit_s, arguments.threads)
            else:
                ranks = ranks or Ranks(arguments.threads)
                found, good = ranks.run(name, family, left, arguments.limit_s)
            done_with = sum(1 for row in found if row.error or row.ran)
            for row in found[:done_with]:
                rows[name, row.strategy] = row
                _tell(f"[{done + 1}/{len(jobs)}]", row)
            write(arguments.out, rows)
            left = left[done_with:]
            if not good and ranks is not None:
                ranks.stop()
                ranks = None
    if ranks is not None:
        ranks.stop()
    text = summary(rows, len(_asked(arguments)), mesh)
    arguments.out.with_suffix(".md").write_text(text)
    print(text.partition("## Each architecture")[0])
    return 0 if all(row.right for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
