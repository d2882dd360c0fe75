"""Whether JSON is what the schemas in the package say."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest


def conforms(found: Any) -> None:
    """Fail where `found` does not conform to the schema of its `format`."""
    jsonschema = pytest.importorskip("jsonschema")
    name = found["format"].removeprefix("autopar-")
    schema = json.loads(resources.files("autopar").joinpath(f"schemas/{name}.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(found, schema, cls=jsonschema.Draft202012Validator)
