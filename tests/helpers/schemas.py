"""Manifests against the schemas that Kubernetes' operators publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml


def check_schema(made: dict[str, Any], folder: str) -> None:
    """Types as the schema says, and no field that it does not know (a cluster would drop it).

    Args:
        made: a manifest.
        folder: with CRDs as YAML.
    """
    jsonschema = pytest.importorskip("jsonschema")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a CRD may have a MiB
    known = [yaml.load(path.read_text(), loader) for path in Path(folder).glob("*.yaml")]
    crds = [found for found in known if found["spec"]["names"]["kind"] == made["kind"]]
    if not crds:
        pytest.skip(f"no CRD of {made['kind']} in XDIT_CRDS")
    (crd,) = crds
    (version,) = [v for v in crd["spec"]["versions"] if f"{crd['spec']['group']}/{v['name']}" == made["apiVersion"]]
    schema = version["schema"]["openAPIV3Schema"]
    strict(schema["properties"]["spec"])
    jsonschema.validate(made, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**made, "spec": {**made["spec"], "unknown": 1}}, schema)


def strict(part: Any) -> None:
    """Refuse fields that a schema does not know."""
    if isinstance(part, dict):
        if "properties" in part and isinstance(part["properties"], dict) and part.get("type") == "object":
            part.setdefault("additionalProperties", bool(part.get("x-kubernetes-preserve-unknown-fields")))
        for value in part.values():
            strict(value)
    elif isinstance(part, list):
        for value in part:
            strict(value)
