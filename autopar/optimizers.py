"""Optimizers made too early: they hold the parameters of the model as it was, and would train nothing."""

from __future__ import annotations

import gc
import warnings

from torch import nn
from torch.optim import Optimizer


def warn_of_optimizers(model: nn.Module) -> None:
    """Warns where an optimizer holds a parameter of `model`, which has been parallelized and gets no gradients now."""
    mine = {id(parameter) for parameter in model.parameters()}
    # Asked for its type alone: what else lives in the process may not want to be looked at.
    optimizers = [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]
    found = {
        type(each).__name__
        for each in optimizers
        for group in each.param_groups
        if any(id(parameter) in mine for parameter in group["params"])
    }
    if found:
        warnings.warn(
            f"{', '.join(sorted(found))}: an optimizer made before parallelize has the parameters of the model that "
            "was passed and does not train the parallel module; make it of that module's parameters()",
            stacklevel=2,
        )
