"""Where an op came from: the module whose forward ran it, and the line of the model's code.

A forward op is placed by the innermost module whose `forward` is running and by the first Python frame outside torch.
Autograd numbers the nodes of its graph; a backward op is run by such a node and has the place of the forward op that
created it.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from passes.errors import CaptureError

_TORCH = f"{Path(torch.__file__).parent}/"
_OWN = f"{Path(__file__).parent.parent}/"
_PLUMBING = ("/module.py", "/container.py", "/functional.py", "/linear.py", "/activation.py", "/normalization.py")
_CALLED = tuple(f"{_TORCH}{part}" for part in ("nn/", "distributions/", "functional.py"))
"""What of torch models call, and what may read values itself."""
_BOUNDARIES = ("run_model", "gradients")
"""Functions of ours that call the model and autograd: frames outside them are not the model's."""

IN_ANOTHER_THREAD = (
    "in another thread, where no op is captured; run all of the forward in the thread that calls the model"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an op came from: forward or backward, the module whose forward ran it, and the line of the model's code."""

    phase: str
    module: str
    source: str


class Provenance:
    """Says, for the op that is running now, where it came from."""

    def __init__(self) -> None:
        self._modules: list[str] = [""]
        self._by_sequence_number: dict[int, Place] = {}
        self._last_number = self._count()
        self._last_place = Place("forward", "", "")
        self.in_backward = False

    def here(self) -> Place:
        """Place of the op being dispatched, to be called below autograd."""
        if self.in_backward:
            node = torch._C._current_autograd_node()
            made_by = self._by_sequence_number.get(node._sequence_nr()) if node is not None else None
            return Place("backward", made_by.module, made_by.source) if made_by else Place("backward", "", "")
        place = Place("forward", self._modules[-1], short_location(*model_line(sys._getframe(1))))
        # The autograd node of a differentiable op is numbered before the op runs below autograd, or, where the op
        # writes in place to a view, after it.
        number = self._count()
        for missed in range(self._last_number + 1, number):
            self._by_sequence_number[missed] = self._last_place
        self._by_sequence_number.setdefault(number, place)
        self._last_number, self._last_place = number, place
        return place

    @staticmethod
    def _count() -> int:
        """Number of autograd's latest node."""
        return torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Follow which module of `model` is running, in this thread alone.

        Raises:
            CaptureError: one of them ran in another thread.
        """
        names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        here, elsewhere = threading.get_ident(), list[str]()

        def enter(module: nn.Module, _args: Any) -> None:
            if threading.get_ident() == here:
                self._modules.append(names.get(id(module), self._modules[-1]))
            elif id(module) in names:
                elsewhere.append(names[id(module)])

        def leave(module: nn.Module, _args: Any, _out: Any) -> None:
            if threading.get_ident() == here:
                self._modules.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        except Exception as error:
            if elsewhere:
                raise CaptureError(f"{elsewhere[0]} ran {IN_ANOTHER_THREAD}") from error
            raise
        finally:
            for hook in hooks:
                hook.remove()
            del self._modules[1:]

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Ops inside belong to the backward."""
        self.in_backward = True
        try:
            yield
        finally:
            self.in_backward = False


_SKIP, _MODEL, _TORCH_MODULE = 0, 1, 2
_kinds: dict[CodeType, int] = {}


def _kind(code: CodeType) -> int:
    kind = _kinds.get(code)
    if kind is None:
        file = code.co_filename
        if file.startswith(_TORCH):
            inside = file.startswith(f"{_TORCH}nn/modules/") and not file.endswith(_PLUMBING)
            kind = _TORCH_MODULE if inside else _SKIP
        else:
            other = file.startswith((_OWN, "<")) or file.endswith("/typing_extensions.py")
            kind = _SKIP if other else _MODEL
        _kinds[code] = kind
    return kind


def model_line(frame: FrameType | None) -> tuple[str, int]:
    """File and line of the innermost frame of the model's code, ("", 0) where there is none.

    torch's own modules count only where no code outside torch is running inside the captured call.
    """
    fallback = ("", 0)
    while frame is not None:
        code = frame.f_code
        if code.co_name in _BOUNDARIES and code.co_filename.startswith(_OWN):
            break
        kind = _kind(code)
        if kind == _MODEL:
            return code.co_filename, frame.f_lineno
        if kind == _TORCH_MODULE:
            fallback = (code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return fallback


def torch_function(frame: FrameType | None) -> str:
    """Name of the function of torch, called by the model, whose own code runs innermost; "" where the model's does."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_CALLED):
            return f"{frame.f_globals['__name__']}.{code.co_qualname.partition('.<locals>')[0]}"
        if not code.co_filename.startswith((_TORCH, _OWN)):
            return ""
        frame = frame.f_back
    return ""


def torch_function_of(error: BaseException) -> str:
    """Name of the innermost function of torch's Python code that was running when `error` was raised; "" without."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    codes = [(frame.f_globals["__name__"], frame.f_code) for frame in frames]
    return next((f"{m}.{c.co_qualname}" for m, c in reversed(codes) if c.co_filename.startswith(_TORCH)), "")


def error_line(error: BaseException) -> tuple[str, int]:
    """File and line of the model's code in which `error` was raised."""
    found, fallback = ("", 0), ("", 0)
    for frame, line in traceback.walk_tb(error.__traceback__):
        kind = _kind(frame.f_code)
        if frame.f_code.co_name in _BOUNDARIES and frame.f_code.co_filename.startswith(_OWN):
            found, fallback = ("", 0), ("", 0)
        elif kind == _MODEL:
            found = (frame.f_code.co_filename, line)
        elif kind == _TORCH_MODULE:
            fallback = (frame.f_code.co_filename, line)
    return found if found[0] else fallback


_short: dict[tuple[str, int], str] = {}


def short_location(file: str, line: int) -> str:
    """`package/file.py:line` for installed code, the path below the working directory for the user's own."""
    if not file:
        return ""
    known = _short.get((file, line))
    if known is None:
        path = Path(file)
        if "site-packages" in path.parts:
            path = Path(*path.parts[path.parts.index("site-packages") + 1 :])
        elif path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        known = _short[file, line] = f"{path}:{line}"
    return known


def shortened(place: str) -> str:
    """`file:line` as `short_location` writes it."""
    file, _, line = place.rpartition(":")
    return short_location(file, int(line)) if file and line.isdigit() else place


def place_of(node: fx.Node) -> str:
    """The line that a node is from, else its module, else its name."""
    return node.meta.get("source") or node.meta.get("module") or f"node {node.name}"
