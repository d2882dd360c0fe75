"""A model that a function of a user's file makes: `file.py:function`."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.models.named_model import Named, Wanted
from passes.capture.default_inputs import default_inputs


def from_file(path: Path, function: str, wanted: Wanted) -> Named:
    """What the function returns: a model, or a model and its inputs.

    Raises:
        ValueError: no such file or function, an error of its own, or something else that it returned.
    """
    name = f"{path}:{function}"
    if wanted.layers is not None:
        raise ValueError(f"--layers is for presets and config.json files; {name} makes its own layers")
    torch.manual_seed(wanted.seed)
    with contextlib.redirect_stdout(sys.stderr):  # what a user's code prints is no part of a report
        found = _returned(path, function)
    model, inputs = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name} returned {_a(model)}; return a torch.nn.Module, or a module and its inputs: a tuple of positional "
            "or a mapping of keyword arguments"
        )
    if inputs is None:
        inputs = default_inputs(model, wanted.batch or 1, wanted.sequence or 128)
    elif wanted.batch is not None or wanted.sequence is not None:
        raise ValueError(f"--batch and --seq: {name} returns its inputs; set them there, or return the module alone")
    return Named(model, inputs, function)


def _returned(path: Path, function: str) -> Any:
    """What a function of a user's file returns.

    Raises:
        ValueError: no such file or function, or the user's own error with the line it came from.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a model is file.py:function")
    name = f"_autopar_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if callable(make):
            return make()
    except (Exception, SystemExit) as error:
        raise ValueError(_its_error(path, error)) from None
    finally:
        sys.path.remove(str(path.parent.resolve()))
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == name and callable(value)]
    raise ValueError(f"{path} has no function {function!r}; it has {', '.join(own) or 'none'}")


def _a(found: object) -> str:
    """`None`, or what it is: `a dict`, `a tuple of 3`, `the class Model, not a module of it`."""
    if isinstance(found, type):
        return f"the class {found.__name__}, not a module of it"
    name = f"a {type(found).__name__}"
    return "None" if found is None else f"{name} of {len(found)}" if isinstance(found, tuple | list) else name


def _its_error(path: Path, error: BaseException) -> str:
    """The user's own error, with the line of the user's file it came from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f"{path}:{line}" if line else str(path)
    return f"{where}: {type(error).__name__}: {error}"
