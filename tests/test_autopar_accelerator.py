"""A loop of accelerate on real ranks beside the same on one device that is given the whole batch."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_near, relative
from ranks import run_ranks
from small_models import llama
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import autopar
from autopar.ranks.together import RankFailedError

BATCH, LENGTH, ROWS = 4, 8, 20
Row = dict[str, Tensor]


def _rows() -> list[Row]:
    ids = torch.randint(0, 96, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


class Stream(torch.utils.data.IterableDataset[Row]):
    def __iter__(self) -> Iterator[Row]:
        return iter(_rows())


def _model() -> Any:
    torch.manual_seed(0)
    return llama(layers=1)[0]


def _parallel(mesh: DeviceMesh, strategy: str, rows: int) -> Any:
    ids = torch.zeros(rows, LENGTH, dtype=torch.long)
    options = autopar.Options(compile=False, progress=False)
    plan = autopar.plan(_model(), mesh, {"input_ids": ids, "labels": ids}, strategy=strategy, options=options)
    return autopar.apply(_model(), plan, mesh)


def _wanted(rates: list[float]) -> tuple[list[float], list[float], nn.Module, Any]:
    """Losses and norms of one pass in steps of two micro-batches, the last of one; plain PyTorch on one device."""
    model = _model()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, norms, rows = [], [], _rows()
    for start in range(0, ROWS, BATCH):
        batch = {key: torch.stack([row[key] for row in rows[start : start + BATCH]]) for key in rows[0]}
        loss = model(**batch).loss
        (loss / 2).backward()
        losses.append(loss.item())
        if len(losses) % 2 == 0 or start + BATCH >= ROWS:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            optim.param_groups[0]["lr"] = rates[len(norms) - 1]
            optim.step()
            optim.zero_grad()
    return losses, norms, model, optim


def _pass(accelerator: Any, model: Any, optim: Any, loader: Any, scheduler: Any) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
            optim.step()
            scheduler.step()
            optim.zero_grad()
        losses.append(loss.item())
    return losses, norms


def _loop(rank: int, ranks: int, folder: str) -> None:
    from autopar.accelerator import Accelerator

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))  # ranks that share a batch are not neighbours
    model = _parallel(mesh, "megatron", BATCH // 2)
    accelerator = Accelerator(model, cpu=True, gradient_accumulation_steps=2)
    assert (accelerator.num_processes, accelerator.process_index) == (2, rank % 2)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # accelerate steps it once per step and data-parallel rank: 1e-2, then two steps of 0.5 each time.
    halved = torch.optim.lr_scheduler.ExponentialLR(optim, 0.5)
    loader = torch.utils.data.DataLoader(_rows(), batch_size=BATCH // 2)  # type: ignore[arg-type]
    model, optim, loader, scheduler = accelerator.prepare(model, optim, loader, halved)
    losses, norms = _pass(accelerator, model, optim, loader, scheduler)
    wanted_losses, wanted_norms, wanted, wanted_optim = _wanted([1e-2, 2.5e-3, 6.25e-4])
    assert losses == pytest.approx(wanted_losses, rel=2e-5)
    assert norms == pytest.approx(wanted_norms, rel=2e-5)
    for name, value in wanted.state_dict().items():
        found = model.state_dict()[name]
        assert_near(found.full_tensor() if isinstance(found, DTensor) else found, value, name)
    # Evaluation: logits of a call with a loss are of the global batch; what is gathered comes once.
    model.eval()
    _metrics(accelerator, model, wanted.eval())
    # Whole weights for others, parts for going on elsewhere.
    accelerator.save_model(model, f"{folder}/model")
    accelerator.wait_for_everyone()
    from safetensors.torch import load_file

    saved = load_file(f"{folder}/model/model.safetensors")
    assert set(saved) == set(wanted.state_dict())
    accelerator.save_state(f"{folder}/state")
    assert not any(name.startswith(("optimizer", "model.")) for name in os.listdir(f"{folder}/state"))
    accelerator.wait_for_everyone()
    other = _parallel(init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",)), "fsdp", 1)
    again = Accelerator(other, cpu=True)
    elsewhere = torch.optim.AdamW(other.parameters(), lr=1.0)
    rates = torch.optim.lr_scheduler.ExponentialLR(elsewhere, 0.9)
    loader = torch.utils.data.DataLoader(_rows(), batch_size=1)  # type: ignore[arg-type]
    other, elsewhere, loader, rates = again.prepare(other, elsewhere, loader, rates)
    again.load_state(f"{folder}/state")
    batch = next(iter(loader))
    other.train()
    wanted.train()
    rows = torch.utils.data.default_collate(_rows()[:4])
    for each, on, by in ((other, batch, elsewhere), (wanted, rows, wanted_optim)):
        each(**on).loss.backward()
        by.param_groups[0]["lr"] = 1e-2
        by.step()
    for name, value in wanted.named_parameters():
        assert_near(dict(other.named_parameters())[name].detach().full_tensor(), value.detach(), name)


def _metrics(accelerator: Any, model: Any, wanted: Any) -> None:
    rows = _rows()[:6]
    loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=BATCH // 2))  # type: ignore[arg-type]
    seen, logits, texts = [], [], []
    for batch in loader:
        with torch.no_grad():
            out = model(**batch)
        one, other = accelerator.gather_for_metrics((out.logits, batch["input_ids"]))
        logits.append(one)
        seen.append(other)
        texts += accelerator.gather_for_metrics([str(row.tolist()) for row in batch["input_ids"]])
    with torch.no_grad():
        whole = torch.utils.data.default_collate(rows)
        assert_near(torch.cat(logits), wanted(**whole).logits, "logits")
    assert torch.equal(torch.cat(seen), whole["input_ids"])
    assert texts == [str(row["input_ids"].tolist()) for row in rows]
    assert accelerator.reduce(torch.tensor(accelerator.process_index + 1.0), "mean").item() == 1.5
    # A stream, which every rank reads; and a flag that one rank raises.
    stream = accelerator.prepare(torch.utils.data.DataLoader(Stream(), batch_size=BATCH // 2))
    first = next(iter(stream))["input_ids"]
    mine = accelerator.process_index * 2
    assert torch.equal(first, torch.stack([row["input_ids"] for row in _rows()[mine : mine + 2]]))
    if torch.distributed.get_rank() == 3:
        accelerator.set_trigger()
    assert accelerator.check_trigger()
    assert not accelerator.check_trigger()


def test_loop(tmp_path: Path) -> None:
    run_ranks(_loop, 4, str(tmp_path))


def _mistakes(rank: int, ranks: int) -> None:
    import accelerate

    from autopar.accelerator import Accelerator

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = _parallel(mesh, "megatron", 2)
    with pytest.raises(ValueError, match=r"use autopar\.accelerator\.Accelerator\(model, \.\.\.\)"):
        accelerate.Accelerator(cpu=True).prepare(model)
    for wrong, message in (
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16'"),
        ({"dynamo_backend": "inductor"}, "compiled already"),
    ):
        accelerate.state.AcceleratorState._reset_state()
        with pytest.raises(ValueError, match=message):
            Accelerator(model, cpu=True, **wrong)  # type: ignore[arg-type]
    accelerate.state.AcceleratorState._reset_state()
    with pytest.raises(ValueError, match="LlamaForCausalLM did not go through autopar"):
        Accelerator(_model(), cpu=True)
    dispatching = accelerate.DataLoaderConfiguration(dispatch_batches=True)
    with pytest.raises(ValueError, match="dispatch_batches=True hands every rank another batch"):
        Accelerator(model, cpu=True, dataloader_config=dispatching).prepare(torch.utils.data.DataLoader(Stream()))
    accelerator = Accelerator(model, cpu=True)
    seed = functools.partial(_seeded, num_workers=1, rank=rank)  # as transformers.Trainer seeds workers
    rows: Any = torch.utils.data.DataLoader(_rows(), worker_init_fn=seed)  # type: ignore[arg-type]
    assert accelerator.prepare(rows).worker_init_fn.keywords == {"num_workers": 1, "rank": 0}
    with pytest.raises(ValueError, match="Around wraps the parallel module 'inner'"):
        accelerator.prepare(Around(model))
    with pytest.raises(ValueError, match="split_between_processes gives every rank another part, and 2 ranks share"):
        accelerator.split_between_processes([1, 2])
    # What a sampler over all ranks would feed.
    batch = torch.utils.data.default_collate(_rows()[2 * rank : 2 * rank + 2])
    with pytest.raises(ValueError, match="input_ids: ranks along 'tp' were given different batches, but only dp"):
        model(**batch)
    same = torch.utils.data.default_collate(_rows()[:2])
    count = torch.tensor(1.0 + rank)
    with pytest.raises((ValueError, RankFailedError), match="num_items_in_batch has no dim that the batch is split in"):
        model(**same, num_items_in_batch=count)
    # Mixed precision, which accelerate puts around the forward of a module.
    accelerate.state.AcceleratorState._reset_state()
    mixed = Accelerator(model, cpu=True, mixed_precision="bf16").prepare(model)
    assert mixed is model
    with torch.autocast("cpu", torch.bfloat16):
        wanted = _model()(**same)
    found = mixed(**same)
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=2e-3)
    logits = found.logits.full_tensor()
    assert logits.dtype == torch.float32
    assert relative(logits, wanted.logits) < 1e-2 < 1e2 * relative(logits, _model()(**same).logits)
    with pytest.raises(ValueError, match=r"use autopar\.accelerator\.Accelerator\(model, \.\.\.\)"):
        accelerate.Accelerator().prepare(model)  # one that ours has prepared before


def _seeded(worker: int, num_workers: int, rank: int) -> None: ...


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_mistakes() -> None:
    run_ranks(_mistakes, 2)
