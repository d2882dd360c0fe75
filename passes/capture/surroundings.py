"""What is in force while a model is traced, beside the tracer: what torch is set to, and what is caught above aten."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from passes.capture.control_flow import control_flow_as_python
from passes.capture.one_process import as_one_process
from passes.capture.picked_counts import counted, is_size, refuse_counts
from passes.capture.torch_functions import INSTEAD
from passes.capture.tracing import Tracer, unwrapped
from passes.capture.values import off_the_record
from passes.capture.written_attention import WrittenAttention
from passes.program.provenance import model_line, short_location

_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_ASKS = re.compile("compiling|tracing")
"""Names of functions that libraries wrap `torch.compiler.is_compiling` in."""


@contextmanager
def tracing(tracer: Tracer, attention: WrittenAttention | None = None) -> Iterator[None]:
    """Record what is run inside, attention as `attention` has it. Random state and global settings are as before
    afterwards."""
    with (
        _random_state_kept(tracer),
        _told_whether_it_is_compiled(tracer),
        _plain_ops(),
        _functional(),
        control_flow_as_python(tracer.location),
        as_one_process(),
        tracer.fake_mode,
        tracer,
        _Calls(tracer, attention),
    ):
        yield


class _Calls(TorchFunctionMode):
    """Handles what is caught above aten: reads of values, and functions of torch that run as others (`INSTEAD`)."""

    def __init__(self, tracer: Tracer, attention: WrittenAttention | None) -> None:
        super().__init__()
        self._tracer = tracer
        self._attention = attention

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS and isinstance(args[0], Tensor):
            real = self._tracer.values_read(unwrapped(args[0]), "the model reads the values of a tensor")
            with off_the_record():
                return func(real, *args[1:], **kwargs)
        if func is Tensor.backward:
            self._tracer.went_back = self._tracer.location()
        if self._tracer.picking.picks:
            refuse_counts(func, args, kwargs)
            if func is Tensor.__getitem__ and self._tracer.is_row_number(args[1]):
                return torch.ops.aten.index.Tensor(args[0], [args[1]])  # Tensor.__getitem__ would read it
            if is_size(func) and (picked := self._tracer.picked(args[0])):
                return counted(func, args, kwargs, picked, self._tracer.picking.refuse)
        run = INSTEAD.get(func, func)
        return run(*args, **kwargs) if self._attention is None else self._attention.call(func, args, kwargs, run)


@contextmanager
def _random_state_kept(tracer: Tracer) -> Iterator[None]:
    """Libraries whose random numbers no graph has as ops, and that were asked for some, are noted."""
    of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        moved = any(np.any(now != then) for now, then in zip(np.random.get_state(), of_numpy, strict=True))
        drawn = {"Python's random": random.getstate() != of_python, "NumPy": moved}
        tracer.notes.extend(
            f"the forward draws random numbers from {library}: every step finds those of the first one, where torch's "
            "are new in each"
            for library, has in drawn.items()
            if has
        )
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def _told_whether_it_is_compiled(tracer: Tracer) -> Iterator[None]:
    """`torch.compiler.is_compiling` says what the tracer's branches do, with a look at who asks: some models compute
    something else when told so."""
    flag, is_compiling = torch.compiler._is_compiling_flag, torch.compiler.is_compiling
    asking: dict[str, None] = {}

    def answered() -> bool:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _ASKS.search(frame.f_code.co_name):
            frame = frame.f_back
        if place := short_location(*model_line(frame)):
            asking[place] = None
        return is_compiling()

    torch.compiler._is_compiling_flag, torch.compiler.is_compiling = tracer.branches.as_compiled, answered
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler.is_compiling = flag, is_compiling
        if asking and tracer.branches.as_compiled:
            places = ", ".join(list(asking)[:3]) + (", ..." if len(asking) > 3 else "")
            tracer.notes.append(f"the model asks whether it is compiled, and is told that it is, at {places}")


@contextmanager
def _plain_ops() -> Iterator[None]:
    """Without ops that stand for a whole module on some devices: attention's fast path, and oneDNN's LSTMs and GRUs."""
    fast_path, one_dnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch._C._set_mkldnn_enabled(one_dnn)


@contextmanager
def _functional() -> Iterator[None]:
    """In-place ops and writes through views as pure ops."""
    torch._enable_functionalization(reapply_views=True)
    try:
        yield
    finally:
        torch._disable_functionalization()
