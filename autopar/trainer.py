"""`transformers.Trainer` for a model that `parallelize` returned. Needs `transformers` and `accelerate`.

What differs from transformers' own: who gets which batch and what is gathered (`autopar.accelerator`), that a loss of
the model is that of the global batch on every rank already, and what checkpoints are made of.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any, cast

import torch
import torch.utils._pytree as pytree

try:
    import transformers
except ImportError as error:
    raise ImportError("autopar.trainer needs the transformers library: pip install 'autopar[trainer]'") from error
from torch import nn

from autopar.accelerator import Accelerator
from autopar.checkpoints import load_parts, load_whole_optimizer, save_parts, whole_state
from autopar.modules.module import ParallelModule

_OPTIMIZER, _OPTIMIZER_FILE, _SCHEDULER_FILE = "optimizer_parts", "optimizer.pt", "scheduler.pt"


class Trainer(transformers.Trainer):
    """`transformers.Trainer` whose `model` is what `autopar.parallelize` returned; all else is as there.

        trainer = Trainer(model=model, args=TrainingArguments(...), train_dataset=data)
        trainer.train()

    Losses, gradient norms and weights are those of the same training on one device that is given the batches of all
    data-parallel ranks. For another kind of trainer put this one before it: `class Mine(Trainer, SFTTrainer)`. A
    `compute_loss` of one's own returns the model's `loss` as it is, or computes this rank's from outputs of a call
    without labels, as under DistributedDataParallel, where `self.accelerator.num_processes` is data-parallel ranks.

    Checkpoints have the weights as `save_pretrained` writes them and the optimizer in parts; training goes on from them
    on any mesh, and from a checkpoint of one device. `save_model` is collective: call it on every rank.

    Raises:
        ValueError: the model is not parallel, or an argument asks for what a parallel module cannot do.
    """

    accelerator: Accelerator

    # --- setting up ---------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Makes an accelerator that knows the model's mesh."""
        _check_arguments(self.args)
        super().create_accelerator_and_postprocess()
        self.accelerator = Accelerator(**self._accelerator_arguments)
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        if self.model is not None:
            self._follow(self.model)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        self._accelerator_arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        return self._accelerator_arguments

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """What `model_init` makes, which has to be a parallel module."""
        model: nn.Module = super().call_model_init(trial)
        self._follow(model)
        return model

    def _follow(self, model: nn.Module) -> None:
        self.accelerator.follow(model)
        if self.args.activation_checkpointing and not getattr(model, "is_activation_checkpointing", False):
            raise ValueError(
                "TrainingArguments(activation_checkpointing=True): the step was captured without it; call "
                "model.activation_checkpointing_enable() before autopar.parallelize, or choose "
                "autopar.Options(recompute=...)"
            )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        del model, device  # it is on its mesh

    # --- losses -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of this step; the model's own is that of the global batch."""
        computed_here = self.compute_loss_func is not None or (self.label_smoother is not None and "labels" in inputs)
        if not computed_here and num_items_in_batch is not None and self.model_accepts_loss_kwargs:
            # Given to the model alone: Trainer would multiply what comes back by the number of data-parallel ranks,
            # which is right for a rank's own share only.
            inputs, num_items_in_batch = {**inputs, "num_items_in_batch": num_items_in_batch}, None
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Loss, logits and labels; logits as this rank's rows."""
        batch = self.accelerator.batch
        assert batch is not None
        return pytree.tree_map(
            lambda value: batch.rows(value) if isinstance(value, torch.Tensor) else value,
            super().prediction_step(*args, **kwargs),
        )

    # --- counting -----------------------------------------------------------------------------------------------------

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples per optimizer step."""
        return int(super().get_total_train_batch_size(args)) // self._sharing

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """This rank's share of the step's."""
        return int(super().floating_point_ops(inputs)) // self._sharing

    @property
    def _sharing(self) -> int:
        return self.accelerator.batch.sharing if self.accelerator.batch is not None else 1

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None:
            state_dict = whole_state(self._parallel, keep=self.args.should_save)
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_parts(os.path.join(output_dir, _OPTIMIZER), self._parallel, self._optimizers_by_name, with_model=False)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, _SCHEDULER_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        parts, whole = (os.path.join(checkpoint, name) for name in (_OPTIMIZER, _OPTIMIZER_FILE))
        if os.path.isdir(parts):
            load_parts(parts, self._parallel, self._optimizers_by_name, with_model=False)
        elif os.path.isfile(whole):
            state = torch.load(whole, map_location="cpu", weights_only=True)
            load_whole_optimizer(self._parallel, self._optimizers_by_name["optimizer"], state)
        else:
            warnings.warn(f"{checkpoint} has no state of an optimizer: it starts anew", stacklevel=2)
        if self.lr_scheduler is not None and os.path.isfile(scheduler := os.path.join(checkpoint, _SCHEDULER_FILE)):
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        ranks = self.args.world_size
        names = [f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else []
        if checkpoint is not None and not all(os.path.isfile(os.path.join(checkpoint, name)) for name in names):
            # Loaded on some ranks alone, those that share a batch would draw other numbers.
            warnings.warn(f"{checkpoint} has no random state for {ranks} ranks: it starts anew", stacklevel=2)
            return
        super()._load_rng_state(checkpoint)

    @property
    def _parallel(self) -> ParallelModule:
        return cast(ParallelModule, self.model)

    @property
    def _optimizers_by_name(self) -> dict[str, Any]:
        return {"optimizer": getattr(self.optimizer, "optimizer", self.optimizer)}  # accelerate's, or torch's


def _check_arguments(args: Any) -> None:
    """Raises ValueError for the first argument that a parallel module cannot follow."""
    laid_out = "the model is laid out by autopar.parallelize and its mesh already; leave it out"
    wrong = (
        ("fsdp", args.fsdp, laid_out),
        ("deepspeed", args.deepspeed, laid_out),
        ("parallelism_config", args.parallelism_config is not None, laid_out),
        ("fp16", args.fp16, "use bf16=True, or autopar.Options(mp_policy=...)"),
        ("fp16_full_eval", args.fp16_full_eval, "a parallel module cannot be converted; evaluate as it is"),
        ("bf16_full_eval", args.bf16_full_eval, "a parallel module cannot be converted; use bf16=True"),
        ("torch_compile", args.torch_compile, "autopar compiles the step (Options(compile=True)); leave it out"),
        (
            "average_tokens_across_devices=False", not args.average_tokens_across_devices,
            "the loss is that of the global batch, divided by its tokens; leave it True",
        ),
        (
            "neftune_noise_alpha", args.neftune_noise_alpha is not None,
            "it hooks into the embedding, and hooks of inner modules do not run on a mesh",
        ),
        ("use_liger_kernel", args.use_liger_kernel, "it changes the model; apply it before autopar.parallelize"),
        (
            "train_sampling_strategy='batch_rebalance'", args.train_sampling_strategy == "batch_rebalance",
            "it gives ranks batches of different sizes; use another",
        ),
        (
            "auto_find_batch_size", args.auto_find_batch_size,
            "a rank without memory left would leave the others waiting; a plan says how much memory a batch takes",
        ),
        ("debug", bool(args.debug), "it hooks into inner modules, and their hooks do not run on a mesh"),
    )  # fmt: skip
    for name, asked, why in wrong:
        if asked:
            raise ValueError(f"TrainingArguments({name}) does not work with a parallel module: {why}")
