"""Arguments that commands share, and what they mean."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar, get_args

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from autopar import examples
from autopar.models.model_argument import load_model
from autopar.models.named_model import Named, Wanted
from autopar.options import Options, Recompute
from costmodel.layout import parse_layout
from costmodel.memory import OPTIMIZERS
from costmodel.presets import hardware, hardware_names
from passes.plan.plan import Plan
from passes.program.precision import dtype_named
from passes.space.named import STRATEGIES

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}

_Value = TypeVar("_Value")

FLAGS = {
    "mesh": "--mesh",
    "batch_dims": "--batch-dim",
    "batch_axes": "--batch-axes",
    "strategy": "--strategy",
    "recompute": "--recompute",
    "memory_budget": "--memory-budget",
    "pins": "--pin",
    "async_tp=True": "--async-tp",
    "reshard_after_forward=False": "--no-reshard-after-forward",
    "regather_activations=False": "--no-regather-activations",
}
"""For `with_flags`: what asks for these parameters of the library, but where a command has a table of its own."""

_DTYPES = ("bfloat16", "float16", "float32")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def mesh(text: str) -> dict[str, int]:
    """`dp=4,tp=2` as a mapping, outermost axis first."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if not equals or not name.isidentifier() or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r} is no axis; write name=ranks, as in dp=4,tp=2")
        if name in found:
            raise argparse.ArgumentTypeError(f"axis {name!r} stands twice in {text!r}")
        found[name] = int(size)
    return found


def axes_named(text: str) -> tuple[str, ...]:
    """`dp,ep` as names of axes."""
    names = tuple(part.strip() for part in text.split(","))
    if not all(name.isidentifier() for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} names no axes; write dp or dp,ep")
    return names


def size(text: str) -> int:
    """`80GiB`, `40GB`, `500000` in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or 80GiB, 40GB, 512MiB")
    found = float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= found < 2**63:
        what = "nothing" if found < 1 else "more than a device has"
        raise argparse.ArgumentTypeError(f"{text!r} is {what}; write bytes, or 80GiB, 40GB, 512MiB")
    return int(found)


def _number(text: str, refusal: str) -> float:
    """A finite number of at least 0, which an argument's text says."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(refusal)
    return number


def share(text: str) -> float:
    """`5%` or `0.05`."""
    number = _number(text.removesuffix("%"), f"{text!r} is no share; write 5% or 0.05")
    return number / 100 if text.endswith("%") else number


def count(text: str) -> int:
    """A positive whole number."""
    if not re.fullmatch(r"0*[1-9]\d{0,17}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number of at most 18 digits")
    return int(text)


def seconds(text: str) -> float:
    """A time above zero: `2.5`."""
    refusal = f"{text!r} is no time; write seconds, as in 2.5"
    if number := _number(text, refusal):
        return number
    raise argparse.ArgumentTypeError(refusal)


def output(text: str) -> str:
    """A file to be written: its folder is there, which is said before the work is done and not after."""
    folder = Path(text).resolve().parent
    if not folder.is_dir() or Path(text).is_dir():
        found = f"no folder {folder}" if not folder.is_dir() else "a folder"
        raise argparse.ArgumentTypeError(f"cannot write {text}: {found}; name a file in a folder that is there")
    return text


def check_outputs(read: Mapping[str, str | None], **outputs: str | None) -> None:
    """Refuse files to be written that are one file, or one that is read; `read`: argument -> file, or a model in one;
    `outputs`: flag -> file.

    Raises:
        ValueError: names both.
    """
    taken: dict[Path, str] = {}
    for name, source in read.items():
        if source is not None:
            path, _, function = source.rpartition(":")
            file_of = path if function and path.endswith(".py") else source
            taken[Path(file_of).resolve()] = f"{name} ({source})"
    for flag, file in outputs.items():
        if file is None:
            continue
        where = Path(file).resolve()
        if where in taken:
            raise ValueError(f"--{flag} and {taken[where]} are one file, {file}; write to another")
        taken[where] = f"--{flag}"


@contextmanager
def writing(flag: str, file: str) -> Iterator[None]:
    """Inside, the file of a flag is written.

    Raises:
        ValueError: it cannot be; names the flag.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of what is a pipe has seen enough
        raise
    except OSError as error:
        raise ValueError(
            f"--{flag}: cannot write {file}: {error.strerror}; name a file that can be written, where there is room"
        ) from error


def pin(text: str) -> tuple[str, str]:
    """`*.q_proj.weight=RS(0)` as (pattern, layout)."""
    pattern, equals, layout = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no pin; write PATTERN=LAYOUT, as in '*.q_proj.weight=RS(0)', or with the layout at rest too: "
            "'*.q_proj.weight=S(0)S(0) -> RS(0)'"
        )
    for part in layout.split("->"):
        try:
            parse_layout(part.strip())
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return pattern, layout


def batch_dim(text: str) -> tuple[str, int | None]:
    """`position_ids=1` as (input, dim); of `mask=none`, which all samples share, the dim is None."""
    name, _, dim = text.rpartition("=")
    if not name or not re.fullmatch(r"-?\d+|none", dim):
        raise argparse.ArgumentTypeError(
            f"{text!r} names no input's dim; write INPUT=DIM, as in position_ids=1, or mask=none where samples share it"
        )
    return name, None if dim == "none" else int(dim)


def dtype(text: str) -> torch.dtype:
    """`bfloat16`, or `bf16` for short."""
    name = _SHORT.get(text, text)
    if name not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(_DTYPES)}")
    return dtype_named(name)


def tolerance(text: str) -> float:
    """A relative error: `1e-5`."""
    return _number(text, f"{text!r} is no relative error; write 1e-5")


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what it is fed."""
    parser.add_argument("model", metavar="MODEL", help="a preset, a config.json or its folder, or file.py:function")
    parser.add_argument("--batch", type=count, metavar="N", help="sequences per data-parallel rank (1)")
    parser.add_argument("--seq", type=count, metavar="N", help="sequence length (2048, or the model's most)")
    parser.add_argument("--layers", type=count, metavar="N", help="so many layers instead of the model's own")
    add_batch_dim(parser)


def add_batch_dim(parser: argparse.ArgumentParser) -> None:
    """--batch-dim."""
    parser.add_argument(
        "--batch-dim", type=batch_dim, action="append", default=[], metavar="INPUT=DIM",
        help="the dim of an input that the batch axes split, where its shape does not tell, as in position_ids=1, or "
        "mask=none for one that all samples share; may be given again",
    )  # fmt: skip


def add_fused_attention(parser: argparse.ArgumentParser) -> None:
    """--fused-attention."""
    parser.add_argument(
        "--fused-attention", action="store_true",
        help="price attention that the model writes out (sinks, soft caps, eager), or gives a mask or dropout, as a "
        "framework's kernel for it; plans run it as written",
    )  # fmt: skip


def add_mesh(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--mesh."""
    parser.add_argument(
        "--mesh", type=mesh, required=required, metavar="AXES", help="axis=ranks, outermost first: dp=4,tp=2"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def known_hardware(text: str) -> str:
    """A preset's name or a file of figures, as it stands: what is wrong with it is said before any work is done."""
    try:
        hardware(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """--hardware."""
    parser.add_argument(
        "--hardware",
        type=known_hardware,
        metavar="NAME",
        help=f"{', '.join(hardware_names())}, or a file: calibrate's, or what changes these (default: this machine)",
    )


def add_memory(parser: argparse.ArgumentParser) -> None:
    """What there is, and what the optimizer takes of it."""
    parser.add_argument("--memory-budget", type=size, metavar="SIZE", help="per device: 80GiB (what the device has)")
    parser.add_argument(
        "--optimizer", choices=(*OPTIMIZERS, "none"), metavar="NAME",
        help=f"whose states to budget for: {', '.join(OPTIMIZERS)}, none (adamw, which search takes as adamw-master "
        "where parameters are in a lower precision; adam is adamw without that)",
    )  # fmt: skip


def add_recompute(parser: argparse.ArgumentParser) -> None:
    """--recompute."""
    parser.add_argument(
        "--recompute", choices=get_args(Recompute),
        help="what backward computes again: the least that fits (auto, the default), nothing, the attention core "
        "(selective), products that give more than they read (widening), or all of a layer",
    )  # fmt: skip


def add_planning(parser: argparse.ArgumentParser) -> None:
    """What decides a plan."""
    add_hardware(parser)
    parser.add_argument("--strategy", choices=STRATEGIES, help="default: auto")
    add_memory(parser)
    parser.add_argument("--accumulate", type=count, metavar="N", help="micro-batches per step (1)")
    add_recompute(parser)
    parser.add_argument(
        "--batch-axes", type=axes_named, metavar="AXES",
        help="axes that split the batch, as in dp,ep (dp, dp_replicate, dp_shard, fsdp, data, batch and the like do)",
    )  # fmt: skip
    parser.add_argument(
        "--param-dtype", type=dtype, metavar="DTYPE",
        help="keep parameters in float32 and gather and compute in this (bfloat16), as FSDP2's mixed precision does",
    )  # fmt: skip
    parser.add_argument(
        "--reduce-dtype", type=dtype, metavar="DTYPE", help="add gradients over ranks in this (default: --param-dtype)"
    )
    parser.add_argument(
        "--reshard-after-forward", action=argparse.BooleanOptionalAction,
        help="free gathered parameters after forward and gather them again for backward, or keep them (auto decides)",
    )  # fmt: skip
    parser.add_argument(
        "--regather-activations", action=argparse.BooleanOptionalAction,
        help="free gathered activations after forward and gather them again for backward, or keep them (where memory "
        "asks for it)",
    )  # fmt: skip
    parser.add_argument(
        "--async-tp", action=argparse.BooleanOptionalAction,
        help="products in parts beside the collectives of activations, by torch's micro-pipelined tensor parallelism",
    )  # fmt: skip
    parser.add_argument(
        "--pin", type=pin, action="append", default=[], metavar="PATTERN=LAYOUT",
        help="fix a parameter's layout in compute, as in '*.q_proj.weight=RS(0)'; may be given again",
    )  # fmt: skip


def planning_asked(given: argparse.Namespace) -> list[str]:
    """The flags of `add_planning` that were given."""
    own = argparse.ArgumentParser(add_help=False)
    add_planning(own)
    left_open = vars(own.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, value in left_open.items() if getattr(given, name) != value]


def options_of(given: argparse.Namespace, kept: Options | None = None) -> Options:
    """The options that the arguments of `add_model` and `add_planning` mean; what they leave open is as in `kept`."""
    kept = kept or Options()
    batch_dims = once("--batch-dim", given.batch_dim)
    asked = {
        "memory_budget": given.memory_budget,
        "accumulate": given.accumulate,
        "optimizer": given.optimizer,
        "recompute": given.recompute,
        "batch_axes": given.batch_axes,
        "batch_dims": {**(kept.batch_dims or {}), **batch_dims} or None,
        "mp_policy": _policy(given),
        "reshard_after_forward": given.reshard_after_forward,
        "regather_activations": given.regather_activations,
        "async_tp": given.async_tp,
    }
    pins = {key: layout for key, layout in kept.pins.items() if not any(fnmatchcase(key, new) for new, _ in given.pin)}
    pins |= once("--pin", given.pin)
    return replace(kept, pins=pins, **{name: value for name, value in asked.items() if value is not None})


def once(flag: str, pairs: Iterable[tuple[str, _Value]]) -> dict[str, _Value]:
    """What a flag that may be given again says of each name; two things of one name are a ValueError."""
    found: dict[str, _Value] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise ValueError(f"{flag} names {name!r} twice, as {found[name]} and as {value}; give one")
    return found


def _policy(given: argparse.Namespace) -> MixedPrecisionPolicy | None:
    if given.param_dtype is None and given.reduce_dtype is None:
        return None
    return MixedPrecisionPolicy(param_dtype=given.param_dtype, reduce_dtype=given.reduce_dtype)


def named_model(
    given: argparse.Namespace, *, on_cpu: bool = False, options: Options | None = None, kept: Plan | None = None
) -> Named:
    """The model that the arguments of `add_model` mean, stored as `options` (default: those of `given`) has it.

    Where one of --batch and --seq is given, the other is as in `kept`.
    """
    if options is None:
        options = options_of(given) if hasattr(given, "param_dtype") else Options()
    batch, sequence = given.batch, given.seq
    if kept is not None and (batch is None) != (sequence is None):
        rows, length = _fed(kept)
        batch, sequence = batch or rows, sequence or length
    wanted = Wanted(batch, sequence, given.layers, dtype=stored_dtype(options), on_cpu=on_cpu)
    return load_model(given.model, wanted)


def _fed(kept: Plan) -> tuple[int | None, int | None]:
    """Sequences per data-parallel rank and their length, where a plan was made for token ids."""
    ids = examples.restored(kept.example)[1].get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return None, None
    rows, length = ids.shape
    return rows, length


def stored_dtype(options: Options) -> str:
    """What a model that is made by name holds its parameters in: float32 where a policy has it compute in another."""
    return "float32" if options.mp_policy is not None and options.mp_policy.param_dtype is not None else "bfloat16"
