"""What the library was given, in the words of the command line.

Errors name a parameter as Python has it: `cp=2`, `reshard=False`, `Options(batch_dims={'mask': None})`. A command says
which flag that is, of a parameter or of one value of it: `{"cp": "--cp", "reshard=False": "--keep-gathered"}`.
"""

from __future__ import annotations

import re
import shlex
from ast import literal_eval
from collections.abc import Mapping

_GIVEN = re.compile(r"(Options\()?\b(\w+)=('[^']*'|\{[^{}]*\}|\([^()]*\)|\d+|True|False|None)(?(1)\))")


def with_flags(text: str, flags: Mapping[str, str]) -> str:
    """An error of the library, with the flags that ask for what it names."""

    def told(given: re.Match[str]) -> str:
        _, name, value = given.groups()
        if name not in flags:
            return flags.get(f"{name}={value}", given[0])
        try:
            return _asked(flags[name], literal_eval(value))
        except (ValueError, SyntaxError):  # in words: `batch_dims={name: dim}`
            return given[0]

    return _GIVEN.sub(told, text)


def _asked(flag: str, value: object) -> str:
    """The flag with a value; once for each entry of a mapping, but for a mesh."""
    if isinstance(value, Mapping):
        entries = [shlex.quote(f"{key}={'none' if one is None else one}") for key, one in value.items()]
        return f"{flag} {','.join(entries)}" if flag == "--mesh" else " ".join(f"{flag} {one}" for one in entries)
    return f"{flag} {','.join(value) if isinstance(value, tuple) else value}"
