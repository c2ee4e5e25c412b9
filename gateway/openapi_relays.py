"""What the OpenAPI document says of relays and their credentials."""

from __future__ import annotations

from gateway.openapi_paths import Json, json_answer, listed, obj, operation, path_id, ref
from gateway.providers import PROVIDERS
from policy.credentials import LONGEST, SHORTEST

_STRING = {"type": "string"}
_MAYBE_STRING = {"type": ["string", "null"]}
_SECONDS = {"type": ["integer", "null"], "description": "Unix seconds."}
_TENANT = {**_MAYBE_STRING, "description": "Its slug; null: of all who have none of their own."}

_RELAY: Json = {
    "provider": {"type": "string", "enum": sorted(PROVIDERS), "description": "Whose wire it speaks."},
    "base_url": {**_MAYBE_STRING, "description": "Null: the provider's own."},
    "region": {**_MAYBE_STRING, "description": "Where it processes audio."},
    "models": {
        "type": ["array", "null"],
        "items": _STRING,
        "description": "The first is the default. Null: the provider's own.",
    },
    "status": {"type": "string", "enum": ["active", "disabled"], "default": "active"},
}

SCHEMAS: Json = {
    "Relay": obj(
        {
            "object": {"const": "relay"},
            "name": {**_STRING, "description": "What policies, prices and the ledger call it."},
            **_RELAY,
            "created_by": _STRING,
            "created_at": _SECONDS,
            "changed_at": _SECONDS,
            "credentials": {"type": "array", "items": ref("Credential"), "description": "Those in use."},
        }
    ),
    "Relays": listed("Relay", cursor=False),
    "RelayRequest": obj(_RELAY, required=["provider"]),
    "Credential": obj(
        {
            "object": {"const": "relay.credential"},
            "id": _STRING,
            "relay": _STRING,
            "tenant": _TENANT,
            "prefix": {**_STRING, "description": "The key's beginning."},
            "master_key": {**_STRING, "description": "The id of the master key over it."},
            "status": {"type": "string", "enum": ["active", "retired"]},
            "created_by": _STRING,
            "created_at": _SECONDS,
            "retired_at": _SECONDS,
            "last_used_at": _SECONDS,
        }
    ),
    "Credentials": listed("Credential", cursor=False),
    "CredentialRequest": obj(
        {"key": {**_STRING, "minLength": SHORTEST, "maxLength": LONGEST, "writeOnly": True}, "tenant": _TENANT},
        required=["key"],
    ),
}

PATHS: Json = {
    "/v1/admin/relays": {
        "get": operation(
            "List relays",
            "Accounts with managed providers, with their credentials in use; for an operator's token.",
            json_answer("Relays"),
            scope="operator",
        )
    },
    "/v1/admin/relays/{name}": {
        "get": operation(
            "Show a relay", "One of the list.", json_answer("Relay"), scope="operator", parameters=[path_id("name")]
        ),
        "put": operation(
            "Put a relay",
            "A new one, or another in its place. Provider and address stay while it has credentials in use.",
            json_answer("Relay"),
            scope="operator",
            parameters=[path_id("name")],
            requestBody={"required": True, "content": {"application/json": {"schema": ref("RelayRequest")}}},
        ),
        "delete": operation(
            "Remove a relay",
            "When all of its credentials are retired.",
            {"204": {"description": "It is gone."}},
            scope="operator",
            parameters=[path_id("name")],
        ),
    },
    "/v1/admin/relays/{name}/credentials": {
        "get": operation(
            "List a relay's credentials",
            "Retired ones too. Of a key only the beginning is told.",
            json_answer("Credentials"),
            scope="operator",
            parameters=[path_id("name")],
        ),
        "post": operation(
            "Add a credential",
            "In use from now on, in place of the one before it, which is retired. The key is told never again.",
            json_answer("Credential", "Added.", "201"),
            scope="operator",
            parameters=[path_id("name")],
            requestBody={"required": True, "content": {"application/json": {"schema": ref("CredentialRequest")}}},
        ),
    },
    "/v1/admin/relays/{name}/credentials/{credential_id}": {
        "delete": operation(
            "Retire a credential",
            "Out of use within seconds, and for good.",
            {"204": {"description": "It is retired."}},
            scope="operator",
            parameters=[path_id("name"), path_id("credential_id")],
        )
    },
}
