"""Manifests against Kubernetes' own schemas, which `kubernetes_validate` brings along; no cluster is asked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from length import length
from test_manifests import MANIFESTS, documents

KUBERNETES = "1.37"


def fields(required: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Schema of an object that has these fields and no others."""
    return {
        "type": "object",
        "properties": required | more,
        "required": sorted(required),
        "additionalProperties": False,
    }


def custom(spec: dict[str, Any]) -> dict[str, Any]:
    return fields({"apiVersion": TEXT, "kind": TEXT, "metadata": fields({"name": TEXT}), "spec": spec})


TEXT = {"type": "string", "minLength": 1}
NUMBER = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object"}  # a PodTemplate of Kubernetes' own, which `errors` looks at
HEAD = fields({"rayStartParams": TEXTS, "template": POD})
WORKERS = fields(
    {"groupName": TEXT, "rayStartParams": TEXTS, "template": POD},
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
)
RAY_CLUSTER = fields(
    {"headGroupSpec": HEAD}, rayVersion=TEXT, workerGroupSpecs={"type": "array", "items": WORKERS}
)
ENDPOINT = fields({"port": TEXT}, path=TEXT, interval=TEXT)
CUSTOM = {
    "RayService": custom(fields({"serveConfigV2": TEXT, "rayClusterConfig": RAY_CLUSTER})),
    "RayJob": custom(
        fields(
            {"entrypoint": TEXT, "rayClusterSpec": RAY_CLUSTER},
            backoffLimit=NUMBER,
            shutdownAfterJobFinishes={"type": "boolean"},
            ttlSecondsAfterFinished=NUMBER,
        )
    ),
    "PodMonitor": custom(
        fields(
            {
                "selector": fields({"matchLabels": TEXTS}),
                "podMetricsEndpoints": {"type": "array", "items": ENDPOINT, "minItems": 1},
            }
        )
    ),
}
"""What we use of KubeRay's and the Prometheus operator's resources, by their API references. Their schemas are in no package."""


USERS_OWN = ("labels", "matchLabels", "selector", "rayStartParams", "limits", "requests")
"""Fields whose keys are names of the user's own."""


def errors(document: Any) -> list[str]:
    """What a strict API server would refuse in a manifest."""
    schema = CUSTOM.get(document.get("kind"))
    if schema is None:
        return _kubernetes(document)
    found = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]
    for template in _templates(document.get("spec")):
        found += _kubernetes(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        )
    return found


def _kubernetes(document: Any) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    except (KeyError, kubernetes_validate.SchemaNotFoundError) as error:
        return [str(error)]
    return []


def _templates(value: Any) -> Iterator[Any]:
    """Pod templates anywhere below."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from [below] if key == "template" else _templates(below)
    elif isinstance(value, list):
        for below in value:
            yield from _templates(below)


def misspelt(value: Any) -> Iterator[Any]:
    """A document once with each of its keys misspelt, but for those below `USERS_OWN`."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield {f"{k}x" if k == key else k: v for k, v in value.items()}
            if key not in USERS_OWN:
                for made in misspelt(below):
                    yield value | {key: made}
    elif isinstance(value, list):
        for i, below in enumerate(value):
            for made in misspelt(below):
                yield [*value[:i], made, *value[i + 1 :]]


@pytest.mark.parametrize("path", MANIFESTS)
def test_manifests_are_what_the_schemas_say(path: str) -> None:
    assert [errors(document) for document in documents(path)] == [[] for _ in documents(path)]


@pytest.mark.parametrize("path", MANIFESTS)
def test_no_misspelt_field_is_accepted(path: str) -> None:
    planted = [made for document in documents(path) for made in misspelt(document)]
    assert len(planted) > 50
    assert [made for made in planted[:: length(4, 1)] if not errors(made)] == []


def test_a_wrong_type_is_refused() -> None:
    deployment = copy.deepcopy(documents(MANIFESTS[0])[0])
    deployment["spec"]["replicas"] = "2"
    assert errors(deployment)
