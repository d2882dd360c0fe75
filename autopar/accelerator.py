"""`accelerate` for a model that `parallelize` returned. Needs `accelerate`, which `autopar` does not install.

The processes that accelerate counts are data-parallel ranks here: loaders give ranks that share a batch the same one,
and what is gathered for metrics comes once from each data-parallel rank. The model is left as it is, as it exchanges
its gradients itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist

try:
    import accelerate
except ImportError as error:
    raise ImportError("autopar.accelerator needs the accelerate library: pip install 'autopar[trainer]'") from error
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType, DynamoBackend, recursively_apply
from torch import nn
from torch.distributed.tensor import DTensor

from autopar.checkpoints import load_parts, save_parts, whole_state
from autopar.modules.batches import BatchRanks
from autopar.modules.module import ParallelModule
from autopar.modules.runtime import runtime_of

_PARTS = "parallel_{}"
_WRAPPING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class Accelerator(accelerate.Accelerator):
    """`accelerate.Accelerator` for a model that `autopar.parallelize` returned, and its keyword arguments.

        accelerator = Accelerator(model, gradient_accumulation_steps=2)
        model, optim, loader = accelerator.prepare(model, optim, loader)

    `num_processes` and `process_index` are those of data-parallel ranks, and `gather`, `gather_for_metrics` and
    `reduce` go over these. `save_model`, `get_state_dict` and `save_state` are collective: call them on every rank.
    What `save_state` writes can be loaded on another mesh.

    model: None where `follow` is called with it before anything is prepared.

    Raises:
        ValueError: an argument that asks for what a parallel module has already, or cannot have.
    """

    flag_tensor: torch.Tensor | None
    _models: list[nn.Module]
    _optimizers: list[Any]

    def __init__(self, model: nn.Module | None = None, **kwargs: Any) -> None:
        self.batch: BatchRanks | None = None
        super().__init__(**kwargs)
        if self.parallelism_config is not None or self.distributed_type in _WRAPPING:
            raise ValueError(
                "Accelerator: the model is laid out by autopar.parallelize and its mesh already; leave out "
                "parallelism_config, FSDP's, DeepSpeed's and Megatron's plugins (and their ACCELERATE_USE_* variables)"
            )
        if self.state.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"Accelerator(mixed_precision={self.state.mixed_precision!r}) does not work with a parallel module: "
                "use 'bf16', or autopar.Options(mp_policy=...)"
            )
        if self.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise ValueError(
                "the parallel module's step is compiled already (autopar.Options(compile=True)): leave out "
                "dynamo_backend, dynamo_plugin and torch_compile"
            )
        if model is not None:
            self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Splits batches as `model` does."""
        if not isinstance(model, ParallelModule):
            raise ValueError(f"{_wrong(model)}; pass what autopar.parallelize returned")
        batch = runtime_of(model).batch
        if self.batch is not None and (self.batch.count, self.batch.index) != (batch.count, batch.index):
            raise ValueError(
                f"this model splits batches into {batch.count} parts and the first one into {self.batch.count}; use "
                "one mesh for all of them"
            )
        if batch.mesh.size() != self.state.num_processes:
            raise ValueError(
                f"the model is on {batch.mesh.size()} ranks but accelerate sees {self.state.num_processes} processes; "
                "start them with torchrun or accelerate launch, and with cpu=True for a CPU mesh"
            )
        self.batch = batch

    @property
    def num_processes(self) -> int:
        """Data-parallel ranks."""
        return self.state.num_processes if self.batch is None else self.batch.count

    @property
    def process_index(self) -> int:
        """Which data-parallel rank this is."""
        return self.state.process_index if self.batch is None else self.batch.index

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether rank 0 hands batches out. Not where ranks share them: each reads the data set itself."""
        chosen = cast("bool | None", super().dispatch_batches)
        if self.batch is None or self.batch.sharing == 1:
            return chosen
        if chosen:
            raise ValueError(
                "dispatch_batches=True hands every rank another batch, and ranks of this mesh share them; leave it "
                "out: every rank then reads the data set and takes its part"
            )
        return False

    def prepare_data_loader(self, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        """A loader of this data-parallel rank's batches."""
        if self.batch is None:
            raise ValueError("prepare: which ranks share a batch follows from the model; Accelerator(model) first")
        start = getattr(data_loader, "worker_init_fn", None)
        if isinstance(start, functools.partial) and "rank" in start.keywords:
            # What transformers.Trainer seeds workers by: ranks that share a batch have to draw the same numbers.
            data_loader.worker_init_fn = functools.partial(start, rank=self.process_index)
        return super().prepare_data_loader(data_loader, *args, **kwargs)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """The same module, with autocast around its forward under mixed precision; others as accelerate does."""
        inside = [name for name, each in model.named_modules() if name and isinstance(each, ParallelModule)]
        if inside:
            raise ValueError(
                f"{type(model).__name__} wraps the parallel module {inside[0]!r}: wrap the model (LoRA too) before "
                "autopar.parallelize"
            )
        if not isinstance(model, ParallelModule):
            return cast(nn.Module, super().prepare_model(model, device_placement, evaluation_mode))
        self.follow(model)
        runtime = runtime_of(model)
        runtime.accelerating = True
        try:
            return cast(nn.Module, super().prepare_model(model, device_placement=False, evaluation_mode=True))
        finally:
            runtime.accelerating = False

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """A scheduler that steps as often as samples of a data-parallel rank ask for."""
        made = super().prepare_scheduler(scheduler)
        if self.batch is not None and self.batch.sharing > 1 and type(made) is AcceleratedScheduler:
            shared = _Scheduler(
                made.scheduler, made.optimizers, step_with_optimizer=made.step_with_optimizer,
                split_batches=made.split_batches,
            )  # fmt: skip
            shared.times = self.batch.count
            self._schedulers[self._schedulers.index(made)] = made = shared
        return made

    def gather(self, tensor: Any) -> Any:
        """Tensors of all data-parallel ranks, joined in dim 0; outputs that are DTensors made whole."""
        if self.batch is None:
            return super().gather(tensor)
        return recursively_apply(self.batch.gathered, tensor, error_on_other_type=True)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """`gather`, less what filled the last batch up."""
        if self.batch is not None and not self.batch.first and (use_gather_object or not _is_tensors(input_data)):
            input_data, use_gather_object = [], True  # objects go over all ranks
        return super().gather_for_metrics(input_data, use_gather_object)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum, mean or maximum over data-parallel ranks."""
        batch = self.batch
        if batch is None:
            return super().reduce(tensor, reduction, scale)
        op = dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM

        def reduced(value: torch.Tensor) -> torch.Tensor:
            total = batch.summed(value, op)
            return total / batch.count if reduction == "mean" else total

        return recursively_apply(reduced, tensor, error_on_other_type=True)

    def split_between_processes(self, *args: Any, **kwargs: Any) -> Any:
        """This rank's part of what a script made; not where ranks share a batch, as it goes by ranks."""
        if self.batch is not None and self.batch.sharing > 1:
            raise ValueError(
                f"split_between_processes gives every rank another part, and {self.batch.sharing} ranks share a batch "
                "here; cut by num_processes and process_index, which are data-parallel ranks"
            )
        return super().split_between_processes(*args, **kwargs)

    def check_trigger(self) -> bool:
        """Whether any rank has set the trigger."""
        flag = self.flag_tensor if self.flag_tensor is not None else torch.tensor(0, device=self.device)
        found = bool(super().reduce(flag).item() >= 1)
        self.flag_tensor = torch.tensor(0, device=self.device) if found else flag
        return found

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor | None:
        """Clips gradients; the norm of all of them, whole."""
        norm = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else cast("torch.Tensor | None", norm)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> Any:
        """The model's state with whole tensors, on ranks that write files; empty on others."""
        if isinstance(model, ParallelModule):
            return whole_state(model, keep=self._writes)
        return super().get_state_dict(model, unwrap)

    def save_state(self, output_dir: Any = None, **kwargs: Any) -> Any:
        """`accelerate`'s, with parameters and optimizers' states in parts."""

        def save(_models: Any, _weights: Any, folder: str) -> None:
            for number, (model, optimizers) in enumerate(mine):
                save_parts(os.path.join(folder, _PARTS.format(number)), model, optimizers, with_model=True)

        with self._set_aside() as mine, self._hook(self.register_save_state_pre_hook(save)):
            return super().save_state(output_dir, **kwargs)

    def load_state(self, input_dir: Any = None, **kwargs: Any) -> None:
        """Loads what `save_state` saved, on this mesh or another."""

        def load(_models: Any, folder: str) -> None:
            for number, (model, optimizers) in enumerate(mine):
                load_parts(os.path.join(folder, _PARTS.format(number)), model, optimizers, with_model=True)

        with self._set_aside() as mine, self._hook(self.register_load_state_pre_hook(load)):
            super().load_state(input_dir, **kwargs)

    @property
    def _writes(self) -> bool:
        each_node = self.project_configuration.save_on_each_node
        return bool(self.is_local_main_process if each_node else self.is_main_process)

    @contextlib.contextmanager
    def _set_aside(self) -> Iterator[list[tuple[ParallelModule, dict[str, Any]]]]:
        """Parallel modules with their optimizers, which accelerate does not see meanwhile: it would write rank 0's."""
        models, optimizers = self._models, self._optimizers
        found: list[tuple[ParallelModule, dict[str, Any]]] = []
        others = list(optimizers)
        for model in models:
            if not isinstance(model, ParallelModule):
                continue
            parameters = set(model.parameters())
            own = [each for each in others if any(p in parameters for g in each.param_groups for p in g["params"])]
            others = [each for each in others if not any(each is other for other in own)]
            found.append((model, {f"optimizer_{i}": each.optimizer for i, each in enumerate(own)}))
        self._models = [model for model in models if not isinstance(model, ParallelModule)]
        self._optimizers = others
        if not found and any(isinstance(p, DTensor) for each in others for g in each.param_groups for p in g["params"]):
            self._models, self._optimizers = models, optimizers
            raise ValueError("accelerator.prepare(model, ...) was not given the parallel module, whose state this is")
        try:
            yield found
        finally:
            self._models, self._optimizers = models, optimizers

    @staticmethod
    @contextlib.contextmanager
    def _hook(handle: Any) -> Iterator[None]:
        try:
            yield
        finally:
            handle.remove()


class _Scheduler(AcceleratedScheduler):
    """Steps once for each data-parallel rank, where accelerate's steps for each rank."""

    times = 1
    split_batches: bool

    def step(self, *args: Any, **kwargs: Any) -> None:
        if self.split_batches or not self.step_with_optimizer or not self.gradient_state.sync_gradients:
            super().step(*args, **kwargs)
            return
        self.split_batches = True  # one step a call
        try:
            for _ in range(self.times):
                total = getattr(self.scheduler, "total_steps", None)
                if total is None or self.scheduler._step_count <= total:
                    super().step(*args, **kwargs)
        finally:
            self.split_batches = False


def _is_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


def _wrong(model: nn.Module) -> str:
    return f"{type(model).__name__} did not go through autopar.parallelize"
