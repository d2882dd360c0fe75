"""Random tensors: each element depends on its global index alone, so any dim may be split."""

from __future__ import annotations

import torch

from passes.program import uniform as _registers_the_op  # noqa: F401
from passes.rules.call import Call
from passes.rules.form import Form, FormBuilder
from passes.rules.table import rule


@rule(torch.ops.autopar.uniform.default)
def _uniform(call: Call) -> Form:
    build = FormBuilder()
    return build.form([build.dims(call.operands[0].shape, whole=True)], [build.dims(call.result.shape)])
