"""The JSON Schema of `loss`, `dft` and `dwl`, made of the models: what an editor needs to complete and to check a YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dwl_plugin.config.block import Block
from dwl_plugin.values import REST

__all__ = ["json_schema", "merged_into"]

_NAMES = {"pattern": f"^(?!{REST}$)[A-Za-z_][A-Za-z0-9_]*$"}


def json_schema() -> dict[str, Any]:
    """Schema of a whole config, of which only our keys are described; all others may be anything."""
    block = Block.model_json_schema()
    block["$defs"]["DWLConfig"]["properties"]["classes"]["propertyNames"] = _NAMES
    properties = {key: _without_null(schema) for key, schema in block["properties"].items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dwl_plugin",
        "description": "`loss`, `dft` and `dwl` in an Axolotl config.",
        "type": "object",
        "properties": properties,
        "dependentRequired": {key: ["loss"] for key in properties if key != "loss"},
        "if": {"properties": {"loss": {"const": "dwl"}}, "required": ["loss"]},
        "then": {"required": ["dwl"]},
        "additionalProperties": True,
        "$defs": block["$defs"],
    }


def merged_into(host: Mapping[str, Any]) -> dict[str, Any]:
    """Our schema and the host's, as one; where both know a key, ours describes it."""
    ours = json_schema()
    joined = {key: {**host.get(key, {}), **ours[key]} for key in ("properties", "$defs")}
    return {**ours, "title": "Axolotl with dwl_plugin", "description": "An Axolotl config.", **joined}


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A key that is not wanted is left out; `null` would only be offered for completion."""
    kept = {key: value for key, value in schema.items() if key not in ("anyOf", "default", "title")}
    return {**kept, **next((choice for choice in schema.get("anyOf", ()) if choice != {"type": "null"}), {})}
