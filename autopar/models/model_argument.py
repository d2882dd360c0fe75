"""A model named on the command line: a preset, a Hugging Face config.json or its folder, or `file.py:function`."""

from __future__ import annotations

import difflib
from pathlib import Path

from autopar.models.hugging_face import from_config, from_preset
from autopar.models.model_file import from_file
from autopar.models.named_model import Named, Wanted
from autopar.models.presets import presets


def load_model(argument: str, wanted: Wanted | None = None) -> Named:
    """The model that `argument` names.

    Raises:
        ValueError: nothing of that name, or something that gives no model; says what was found and what would do.
    """
    wanted = wanted or Wanted()
    if argument in presets():
        return from_preset(argument, wanted)
    path, colon, function = argument.rpartition(":")
    if colon and path.endswith(".py"):
        return from_file(Path(path), function, wanted)
    if argument.endswith(".py"):
        if not Path(argument).is_file():
            raise ValueError(f"{argument}: no such file; pass file.py:function, which makes the model")
        raise ValueError(f"{argument}: name the function that makes the model, as in {argument}:build")
    found = Path(argument)
    if argument and found.is_dir():
        found = found / "config.json"
        if not found.exists():
            raise ValueError(f"{argument}: a folder without a config.json")
    if found.is_file():
        return from_config(found, wanted)
    if argument.endswith(".json"):
        raise ValueError(f"{argument}: no such file; pass a Hugging Face config.json")
    near = difflib.get_close_matches(argument.lower(), presets(), n=3, cutoff=0.4)
    hint, known = (f"; did you mean {' or '.join(near)}?", "") if near else (".", f" ({', '.join(presets())})")
    raise ValueError(
        f"no model {argument!r}{hint} A model is a preset{known}, a Hugging Face config.json or its folder, or "
        "file.py:function"
    )
