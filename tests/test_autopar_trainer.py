"""transformers.Trainer on real ranks, beside transformers' own on one device that is given the whole batch."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_near
from ranks import forked, run_ranks
from small_models import llama
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import autopar

BATCH, LENGTH, STEPS = 4, 8, 4


class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows with as many targets as their number says, so that ranks have different numbers of tokens."""

    def __init__(self, rows: int) -> None:
        ids = torch.randint(0, 96, (rows, LENGTH), generator=torch.Generator().manual_seed(3))
        targets = torch.where(torch.arange(LENGTH) > torch.arange(rows)[:, None] % 5 + 2, -100, ids)
        self.rows = [{"input_ids": row, "labels": target} for row, target in zip(ids, targets, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def _model() -> Any:
    torch.manual_seed(0)
    return llama(layers=1)[0]


def _parallel(shape: tuple[int, ...], names: tuple[str, ...], strategy: str, rows: int, **inputs: Tensor) -> Any:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    ids = torch.zeros(rows, LENGTH, dtype=torch.long)
    example = {"input_ids": ids, "labels": ids, **inputs}
    options = autopar.Options(compile=False, progress=False)
    model = _model()
    return autopar.apply(model, autopar.plan(model, mesh, example, strategy=strategy, options=options), mesh)


def _arguments(folder: str, rows: int, **changes: Any) -> Any:
    from transformers import TrainingArguments

    usual = {
        "output_dir": folder, "use_cpu": True, "per_device_train_batch_size": rows, "per_device_eval_batch_size": rows,
        "max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0.5, "warmup_steps": 2,
        "gradient_accumulation_steps": 2, "report_to": "none", "disable_tqdm": True, "seed": 5,
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "include_num_input_tokens_seen": "all",
    }  # fmt: skip
    return TrainingArguments(**(usual | changes))


def _metrics(prediction: Any) -> dict[str, float]:
    logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
    return {"rows": float(len(labels)), "sum": float((logits.double().abs().sum((1, 2)) * labels[:, 0]).sum())}


def _run(kind: Any, model: Any, folder: str, rows: int, resume: Any = None, **changes: Any) -> tuple[Any, Any]:
    """The trainer afterwards, and what it logged without times."""
    trainer = kind(
        model=model, args=_arguments(folder, rows, **changes), train_dataset=Data(40), eval_dataset=Data(12),
        compute_metrics=_metrics,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    kept = ("loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen", "eval_loss", "eval_rows")
    logs = [{k: float(v) for k, v in entry.items() if k in (*kept, "eval_sum")} for entry in trainer.state.log_history]
    return trainer, [entry for entry in logs if "loss" in entry or "eval_loss" in entry]


def _whole(model: Any) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }


def _assert_same(model: Any, weights: dict[str, Tensor]) -> None:
    for name, value in _whole(model).items():
        assert_near(value, weights[name], name)


def transformers_trainer() -> Any:
    from transformers import Trainer

    return Trainer


def _one_device(folder: str) -> Any:
    trainer, logs = _run(transformers_trainer(), _model(), folder, BATCH)
    return logs, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Logs, weights and the folder of checkpoints of the same training on one device."""
    folder = str(tmp_path_factory.mktemp("one"))
    return *forked(_one_device, folder), folder


def _here_and_there(rank: int, ranks: int, folder: str, wanted: Any) -> None:
    """dp=2 x tp=2 from the start, then four fsdp ranks from its checkpoint."""
    from transformers import LlamaForCausalLM

    from autopar.trainer import Trainer

    logs, weights = wanted
    count = torch.tensor(1.0)
    tensor = _parallel((2, 2), ("dp", "tp"), "megatron", 2, num_items_in_batch=count)
    trainer, found = _run(Trainer, tensor, f"{folder}/here", 2)
    assert found == [pytest.approx(entry, rel=2e-5) for entry in logs]
    _assert_same(trainer.model, weights)
    assert trainer.get_total_train_batch_size(trainer.args) == 2 * BATCH
    saved = LlamaForCausalLM.from_pretrained(f"{folder}/here/checkpoint-4")
    assert saved.config.architectures == ["LlamaForCausalLM"]
    _assert_same(saved, weights)
    state = _parallel((4,), ("fsdp",), "fsdp", 1, num_items_in_batch=count)
    trainer, found = _run(Trainer, state, f"{folder}/there", 1, resume=f"{folder}/here/checkpoint-2")
    assert found == [pytest.approx(entry, rel=2e-5) for entry in logs]
    _assert_same(trainer.model, weights)


def test_trains_and_goes_on_elsewhere(one_device: Any, tmp_path: Path) -> None:
    run_ranks(_here_and_there, 4, str(tmp_path), one_device[:2])


def _from_one_device(rank: int, ranks: int, folder: str, wanted: Any) -> None:
    from autopar.trainer import Trainer

    logs, weights, one = wanted
    parallel = _parallel((2,), ("dp",), "ddp", 2, num_items_in_batch=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"use autopar\.accelerator\.Accelerator"):
        _run(transformers_trainer(), parallel, folder, 2)
    trainer, found = _run(Trainer, parallel, folder, 2, resume=f"{one}/checkpoint-2")
    assert found == [pytest.approx(entry, rel=2e-5) for entry in logs]
    _assert_same(trainer.model, weights)
    with pytest.raises(ValueError, match="LlamaForCausalLM did not go through autopar"):
        _run(Trainer, _model(), folder, 2)


def test_goes_on_from_a_checkpoint_of_one_device(one_device: Any, tmp_path: Path) -> None:
    run_ranks(_from_one_device, 2, str(tmp_path), one_device)


def _summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A rank's share of the mean over all tokens, as transformers has users write it."""
    targets = labels[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    return loss / num_items_in_batch


OTHER_LOSSES: dict[str, dict[str, Any]] = {
    "compute_loss_func": {"compute_loss_func": _summed},
    "smoothed": {"label_smoothing_factor": 0.2},
}


def _other_losses(kind: Any, model: Any, folder: str, rows: int) -> dict[str, Any]:
    """What one trainer after another logs, each going on with the model."""
    found = {}
    for name, changes in OTHER_LOSSES.items():
        function = changes.get("compute_loss_func")
        arguments = _arguments(
            folder, rows, max_steps=2, save_strategy="no", eval_strategy="no",
            **{key: value for key, value in changes.items() if key != "compute_loss_func"},
        )  # fmt: skip
        trainer = kind(
            model=model, args=arguments, train_dataset=Data(40), eval_dataset=Data(8), compute_loss_func=function
        )
        trainer.train()
        logs = [
            {key: entry[key] for key in ("loss", "grad_norm")} for entry in trainer.state.log_history if "loss" in entry
        ]
        found[name] = [*logs, {"eval_loss": trainer.evaluate()["eval_loss"]}]
    return found


def _other_losses_of_one_device(folder: str) -> dict[str, Any]:
    return _other_losses(transformers_trainer(), _model(), folder, BATCH)


def _other_losses_on_ranks(rank: int, ranks: int, folder: str, wanted: Any) -> None:
    from autopar.trainer import Trainer

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    example = {"input_ids": ids, "num_items_in_batch": torch.tensor(1.0)}
    options = autopar.Options(compile=False, progress=False)
    model = autopar.apply(_model(), autopar.plan(_model(), mesh, example, strategy="megatron", options=options), mesh)
    found = _other_losses(Trainer, model, folder, 2)
    assert {name: [pytest.approx(e, rel=2e-5) for e in entries] for name, entries in wanted.items()} == found


def test_losses_computed_from_logits(tmp_path: Path) -> None:
    wanted = forked(_other_losses_of_one_device, str(tmp_path / "one"))
    run_ranks(_other_losses_on_ranks, 4, str(tmp_path / "ranks"), wanted)


REFUSED = {
    "fsdp": "full_shard", "deepspeed": "z.json", "parallelism_config": object(), "fp16": True, "fp16_full_eval": True,
    "bf16_full_eval": True, "torch_compile": True, "average_tokens_across_devices": False, "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True, "train_sampling_strategy": "batch_rebalance", "auto_find_batch_size": True,
    "debug": ["underflow_overflow"],
}  # fmt: skip


def test_arguments_that_could_not_be_followed_are_errors(tmp_path: Path) -> None:
    from autopar.trainer import _check_arguments

    usual = _arguments(str(tmp_path), 2)
    _check_arguments(usual)
    for name, value in REFUSED.items():
        changed = copy.copy(usual)
        object.__setattr__(changed, name, value)
        with pytest.raises(ValueError, match=rf"TrainingArguments\({name}.* does not work with a parallel module: \w"):
            _check_arguments(changed)


@pytest.mark.parametrize(("module", "library"), [("trainer", "transformers"), ("accelerator", "accelerate")])
def test_a_library_that_is_not_installed_is_named(module: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"autopar.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"autopar\.{module} needs .*{library}.*: pip install 'autopar\[trainer\]'"):
        importlib.import_module(f"autopar.{module}")
