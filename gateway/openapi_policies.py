"""What the OpenAPI document says of policies and their versions."""

from __future__ import annotations

from typing import Any

from gateway.openapi_paths import Json, json_answer, listed, obj, operation, path_id, query, ref
from policy.policies import PolicyBody

_INTEGER = {"type": "integer"}
_MAYBE_INTEGER = {"type": ["integer", "null"]}
_MAYBE_SECONDS = {"type": ["integer", "null"], "description": "Unix seconds."}
_STRING = {"type": "string"}
_VERSION = {"type": "integer", "minimum": 1}
_TIMING: Json = {
    "effective_from": {**_MAYBE_SECONDS, "description": "Unix seconds, in the future; null: now."},
    "newest": {**_MAYBE_INTEGER, "description": "The newest version that you have seen; 409 if there is a newer one."},
}


def _body_schema() -> Json:
    """The policy's own JSON Schema, its parts in place: it has no place of its own for them in this document."""
    schema = PolicyBody.model_json_schema()
    parts: dict[str, Any] = schema.pop("$defs", {})

    def whole(node: Any) -> Any:
        if isinstance(node, list):
            return [whole(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return whole(parts[node["$ref"].rpartition("/")[2]])
        return {key: whole(value) for key, value in node.items()}

    told: Json = whole(schema)
    return told


_VERSION_FIELDS: Json = {
    "object": {"const": "policy.version"},
    "tenant": _STRING,
    "version": _VERSION,
    "status": {"type": "string", "enum": ["scheduled", "in_force", "past", "withdrawn"]},
    "effective_from": _MAYBE_SECONDS,
    "effective_until": _MAYBE_SECONDS,
    "created_by": _STRING,
    "created_at": {**_INTEGER, "description": "Unix seconds."},
}
_CHANGES: Json = {"type": ["array", "null"], "items": ref("PolicyChange")}

SCHEMAS: Json = {
    "PolicyBody": _body_schema(),
    "Policy": obj({"object": {"const": "policy"}, "version": _VERSION, "body": ref("PolicyBody")}),
    "PolicyVersion": obj({**_VERSION_FIELDS, "body": ref("PolicyBody")}),
    "PolicyVersionHead": obj(_VERSION_FIELDS),
    "PolicyVersions": listed("PolicyVersionHead"),
    "PolicyPut": obj({"body": ref("PolicyBody"), **_TIMING}, required=["body"]),
    "PolicyRollback": obj({"version": _VERSION, **_TIMING}, required=["version"]),
    "PolicyDraft": obj({"body": {"type": "object"}}, required=["body"]),
    "PolicyChange": obj({"field": _STRING, "from": {}, "to": {}}),
    "PolicyDiff": obj({"object": {"const": "policy.diff"}, "from": _VERSION, "to": _VERSION, "changes": _CHANGES}),
    "PolicyCheck": obj(
        {
            "object": {"const": "policy.check"},
            "accepted": {"type": "boolean"},
            "problems": {"type": "array", "items": obj({"field": _STRING, "reason": _STRING})},
            "changes": {**_CHANGES, "description": "Of the policy in force; null where the body cannot be read."},
        }
    ),
    "PolicyDryRun": obj(
        {
            "question": ref("Question"),
            "body": {"type": ["object", "null"], "description": "A draft."},
            "version": {**_MAYBE_INTEGER, "description": "Another version; neither: the policy in force."},
        }
    ),
}


def _sent(schema: str) -> Json:
    return {"required": True, "content": {"application/json": {"schema": ref(schema)}}}


def _operators(summary: str, description: str, answers: Json, *more_parameters: Json, **more: Any) -> Json:
    return operation(
        summary, description, answers, scope="operator", parameters=[path_id("slug"), *more_parameters], **more
    )


_POLICIES = "/v1/admin/tenants/{slug}/policies"

PATHS: Json = {
    _POLICIES: {
        "get": _operators(
            "List a policy's versions",
            "Newest first, without their content.",
            json_answer("PolicyVersions"),
            query("limit", "How many, at most 200.", {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}),
            query("cursor", "`next_cursor` of the page before."),
        ),
        "put": _operators(
            "Put a policy",
            "A new version, in force now or later. Everything that is wrong with it is told at once.",
            json_answer("PolicyVersion", "It is put.", "201"),
            requestBody=_sent("PolicyPut"),
        ),
    },
    f"{_POLICIES}/rollback": {
        "post": _operators(
            "Roll a policy back",
            "The content of an old version, as a new one.",
            json_answer("PolicyVersion", "It is put.", "201"),
            requestBody=_sent("PolicyRollback"),
        )
    },
    f"{_POLICIES}/check": {
        "post": _operators(
            "Check a draft",
            "What is wrong with it, and what it would change. Nothing is put.",
            json_answer("PolicyCheck"),
            requestBody=_sent("PolicyDraft"),
        )
    },
    f"{_POLICIES}/explain": {
        "post": _operators(
            "Explain a decision under a draft",
            "Where a request of the tenant would run; refused as the request itself would be.",
            json_answer("Decision"),
            requestBody=_sent("PolicyDryRun"),
        )
    },
    f"{_POLICIES}/diff": {
        "get": _operators(
            "Compare two versions",
            "The fields in which they differ.",
            json_answer("PolicyDiff"),
            query("from", "A version; default: the one in force.", _VERSION),
            query("to", "Another; default: the one in force.", _VERSION),
        )
    },
    f"{_POLICIES}/{{version}}": {
        "get": _operators(
            "Show a version", "By its number; `current`: in force.", json_answer("PolicyVersion"), path_id("version")
        ),
        "delete": _operators(
            "Withdraw a version",
            "One that is not yet in force; the one before it stays.",
            {"204": {"description": "It is withdrawn."}},
            path_id("version"),
        ),
    },
}
