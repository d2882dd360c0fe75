"""Hardware as a file: versioned JSON, each figure checked when it is read.

A file may name a preset as its `base` and hold only what is otherwise:

    {"format": "autopar-hardware", "version": 2, "base": "h100",
     "hardware": {"ranks_per_node": 4, "inter_node": {"bytes_per_s": 12e9}}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from costmodel.collectives import KINDS
from costmodel.files import read_json, write_whole
from costmodel.hardware import Device, Hardware, Link

FILE_FORMAT = "autopar-hardware"
FILE_VERSION = 2


def save_hardware(hardware: Hardware, path: str | os.PathLike[str], samples: Mapping[str, Any] | None = None) -> None:
    """Write `hardware` as versioned JSON; `samples` are the measurements behind it, kept for the reader."""
    content = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "hardware": asdict(hardware),
        "samples": dict(samples or {}),
    }
    write_whole(path, json.dumps(content, indent=1) + "\n")


_SCALED = ("wide_bytes_per_s", "peer_bytes_per_s", "multicast_bytes_per_s")
"""Rates of a link that are shares of its `bytes_per_s`, where a file says that alone."""


def load_hardware(path: str | os.PathLike[str], preset: Callable[[str], Hardware] | None = None) -> Hardware:
    """The hardware of a file that `save_hardware` wrote, or one that says what is other than in a preset, its `base`.

    preset: gives presets by name; None: a file with a `base` is refused.

    Raises:
        ValueError: no such file, not JSON, another format or version, or a figure that is missing or makes no sense.
    """
    where = os.fspath(path)
    try:
        content = read_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"hardware file {where!r} cannot be read: {error.strerror}; pass a preset's name, or a file that "
            "`autopar calibrate -o FILE` wrote"
        ) from error
    except ValueError as error:
        raise ValueError(f"hardware file {where!r} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
        raise ValueError(
            f"{where!r} is not a hardware file; `autopar calibrate -o FILE` writes one, and "
            f'{{"format": "{FILE_FORMAT}", "version": {FILE_VERSION}, "base": "h100", "hardware": {{...}}}} says what '
            "is other than in a preset"
        )
    if content.get("version") != FILE_VERSION:
        raise ValueError(
            f"hardware file {where!r} has version {content.get('version')!r}; this autopar reads version "
            f"{FILE_VERSION}: calibrate again"
        )
    body = content.get("hardware")
    if (base := content.get("base")) is not None:
        if preset is None or not isinstance(base, str):
            raise ValueError(f"hardware file {where!r}: base: found {base!r}, expected a preset's name")
        try:
            body = _changed(preset(base), body, where)
        except ValueError as error:
            raise ValueError(f"hardware file {where!r}: base: {error}") from error
    return hardware_of(body, where)


def _changed(base: Hardware, body: Any, where: str) -> Any:
    """The fields of `base` with those of `body` in their place; what is none of a hardware's is left for the check."""
    if not isinstance(body, dict):
        return body
    source = f"the preset {base.name}, but for {', '.join(sorted(body)) or 'nothing'} ({where})"
    found = {**asdict(base), "name": Path(where).stem, "source": source}
    for key, value in body.items():
        if not isinstance(value, dict) or not isinstance(found.get(key), dict):
            found[key] = value
            continue
        before = found[key]
        found[key] = {**before, **value}
        if isinstance(peaks := value.get("peak_flops_per_s"), dict):
            found[key]["peak_flops_per_s"] = {**before["peak_flops_per_s"], **peaks}
        rate = value.get("bytes_per_s")
        if isinstance(rate, int | float) and rate > 0:
            shares = {name: before[name] * rate / before["bytes_per_s"] for name in _SCALED if name in before}
            found[key] |= {"name": f"{8 * rate / 1e9:g} Gb/s per rank", **shares, **value}
    return found


def hardware_of(body: Any, where: str) -> Hardware:
    """The hardware that `dataclasses.asdict` made `body` of; `where` it stands, for errors.

    Raises:
        ValueError: a figure that is missing or makes no sense.
    """
    if isinstance(body, dict):  # files that were written before there were these figures
        hosts = {"host_bytes_per_s": Hardware.host_bytes_per_s, "hosts_per_node": Hardware.hosts_per_node}
        body = {**hosts, **body}
        if isinstance(body.get("device"), dict):
            body["device"] = {"step_error": Device.step_error, **body["device"]}
    parts = _typed(body, Hardware, f"{where}: hardware")
    device = parts["device"] = Device(**_typed(parts["device"], Device, f"{where}: hardware.device"))
    if device.reserve_bytes >= device.memory_bytes:
        raise ValueError(
            f"{where}: hardware.device.reserve_bytes: found {device.reserve_bytes}, expected less than memory_bytes, "
            f"{device.memory_bytes}"
        )
    if device.cache_bytes and not device.cache_bytes_per_s:
        raise ValueError(f"{where}: hardware.device.cache_bytes_per_s: found 0, expected the rate of its cache_bytes")
    for link in ("intra_node", "inter_node"):
        if isinstance(parts[link], dict):  # files that were written before there were these figures
            parts[link] = {"wide_bytes_per_s": 0.0, "peer_bytes_per_s": 0.0, **parts[link]}
        body = _typed(parts[link], Link, f"{where}: hardware.{link}")
        body["measured"] = {kind: tuple(figures) for kind, figures in body["measured"].items()}
        parts[link] = Link(**body)
    return Hardware(**parts)


_MAY_BE_ZERO = {
    "latency_s",
    "pipeline_s",
    "base_s",
    "multicast_bytes_per_s",
    "wide_bytes_per_s",
    "peer_bytes_per_s",
    "sms",
    "reserve_bytes",
    "kernel_launch_s",
    "update_s",
    "cache_bytes",
    "cache_bytes_per_s",
    "fp8_matmul_efficiency",
    "speed_spread",
}
_DTYPES = ("bfloat16", "float16", "float8", "tf32", "float32", "float64")
_MOST = dict.fromkeys(
    (
        "matmul_efficiency",
        "fp8_matmul_efficiency",
        "memory_efficiency",
        "attention_efficiency",
        "attention_backward_efficiency",
        "sustained",
        "step_error",
    ),
    1.0,
) | {"speed_spread": 0.1}
"""Shares of a peak; and a spread by which the slowest of a million devices, five deviations off, has half the pace."""


def _typed(body: Any, cls: type, where: str) -> dict[str, Any]:
    """`body` with exactly the fields of `cls`, numbers in range, whole ones as integers (4.0 is 4)."""
    if not isinstance(body, dict):
        raise ValueError(f"{where}: found {type(body).__name__}, expected an object")
    known = {entry.name: str(entry.type) for entry in fields(cls)}
    missing = sorted(set(known) - set(body))
    extra = sorted(set(body) - set(known))
    if missing or extra:
        fields_are = f"; its fields are {', '.join(known)}" if extra else ""
        raise ValueError(f"{where}: missing {missing or 'nothing'}, unknown {extra or 'nothing'}{fields_are}")
    for key, value in body.items():
        _check_field(key, value, known[key], f"{where}.{key}")
    return {key: int(value) if known[key] == "int" else value for key, value in body.items()}


def _check_field(key: str, value: Any, kind: str, where: str) -> None:
    """Refuse a value that a field of this type cannot have; `kind`: the type as it is written."""
    if kind in ("int", "float"):
        _check_number(value, where, zero=key in _MAY_BE_ZERO)
        if value > _MOST.get(key, float("inf")):
            raise ValueError(f"{where}: found {value!r}, expected a share of at most {_MOST[key]:g}")
        if kind == "int" and value != int(value):
            raise ValueError(f"{where}: found {value!r}, expected a whole number")
    elif key == "measured":
        _check_measured(value, where)
    elif kind.startswith("Mapping"):
        if not isinstance(value, dict) or not value:
            raise ValueError(f"{where}: found {value!r}, expected dtype names and their rates")
        _check_names(value, _DTYPES, where)
        for dtype, rate in value.items():
            _check_number(rate, f"{where}.{dtype}", zero=False)
    elif kind == "str" and not isinstance(value, str):
        raise ValueError(f"{where}: found {value!r}, expected text")
    elif kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"{where}: found {value!r}, expected true or false")


def _check_measured(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found {value!r}, expected collectives and their figures")
    _check_names(value, KINDS, where)
    for kind, figures in value.items():
        if not isinstance(figures, (list, tuple)) or len(figures) != 3:
            raise ValueError(f"{where}.{kind}: found {figures!r}, expected [base_s, hop_s, bytes_per_s]")
        for index, figure in enumerate(figures):
            _check_number(figure, f"{where}.{kind}[{index}]", zero=index < 2)


def _check_names(found: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(f"{where}: found {', '.join(map(repr, unknown))}, expected names among {', '.join(known)}")


def _check_number(value: Any, where: str, *, zero: bool) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not (value > 0 or (zero and value == 0)) or value == float("inf"):
        raise ValueError(f"{where}: found {value!r}, expected a {'non-negative' if zero else 'positive'} number")
