"""Files that people keep: written whole or not at all, and read as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to a file beside `path` and puts it there at once: what was there stays if that fails.

    What is no regular file (a terminal, a pipe), or lies in a folder that takes no files, is written as it is.

    Raises:
        OSError: it cannot be written; names the file.
    """
    given, target = Path(path), Path(path).resolve()
    if (given.exists() and not given.is_file()) or not os.access(target.parent, os.W_OK):
        given.write_text(text, encoding="utf-8")
        return
    part = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        part.write_text(text, encoding="utf-8")
        if target.exists():
            part.chmod(target.stat().st_mode)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(target)) from error


def read_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, is nested deeper than Python reads, or has a whole number that is more than any float.
    """
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _whole(digits: str) -> int:
    number = int(digits)
    if abs(number) > sys.float_info.max:
        raise ValueError(f"a number of {len(digits)} digits")
    return number
