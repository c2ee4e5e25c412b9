"""What the OpenAPI document says of webhooks and their deliveries."""

from __future__ import annotations

from gateway.openapi_paths import Json, json_answer, listed, obj, operation, path_id, query, ref
from workers.endpoints import LONGEST_DESCRIPTION, TOPICS
from workers.signing import OVERLAP_MOST_S, OVERLAP_S

_STRING = {"type": "string"}
_INTEGER = {"type": "integer"}
_SECONDS = {"type": ["integer", "null"], "description": "Unix seconds."}
_EVENTS = {"type": "array", "items": {"type": "string", "enum": list(TOPICS)}, "minItems": 1}
_URL = {**_STRING, "format": "uri", "description": "https, at a public address, port 443 or 8443."}
_DESCRIPTION = {**_STRING, "maxLength": LONGEST_DESCRIPTION}
_STATUS = {"type": "string", "enum": ["active", "disabled"]}

_WEBHOOK: Json = {
    "object": {"const": "webhook"},
    "id": _STRING,
    "url": _URL,
    "events": _EVENTS,
    "description": _DESCRIPTION,
    "status": _STATUS,
    "disabled_why": {
        "type": ["string", "null"],
        "enum": ["asked", "gone", "failing", None],
        "description": "`gone`: it answered 410. `failing`: it took nothing for three days.",
    },
    "failing_since": {**_SECONDS, "description": "Unix seconds; null where it took the last delivery."},
    "created_at": _SECONDS,
    "changed_at": _SECONDS,
}
_DELIVERY: Json = {
    "object": {"const": "webhook.delivery"},
    "id": _STRING,
    "webhook": _STRING,
    "event": {**_STRING, "description": "`webhook-id` of every try."},
    "type": _STRING,
    "status": {"type": "string", "enum": ["pending", "delivered", "failed"]},
    "attempts": {**_INTEGER, "description": "Since it was last asked for."},
    "created_at": _SECONDS,
    "next_at": {**_SECONDS, "description": "Unix seconds; null unless it is pending."},
    "ended_at": _SECONDS,
    "last": {"anyOf": [ref("WebhookAttempt"), {"type": "null"}]},
}

SCHEMAS: Json = {
    "Webhook": obj(_WEBHOOK),
    "WebhookMade": obj(
        {**_WEBHOOK, "secret": {**_STRING, "description": "`whsec_…`, told this once."}}, required=["id", "secret"]
    ),
    "Webhooks": listed("Webhook", cursor=False),
    "WebhookRequest": obj({"url": _URL, "events": _EVENTS, "description": _DESCRIPTION}, required=["url"]),
    "WebhookChanges": obj({"url": _URL, "events": _EVENTS, "description": _DESCRIPTION, "status": _STATUS}),
    "WebhookRotation": obj(
        {
            "overlap_s": {
                **_INTEGER,
                "minimum": 0,
                "maximum": OVERLAP_MOST_S,
                "default": OVERLAP_S,
                "description": "For how long the secret before signs beside the new one.",
            }
        }
    ),
    "WebhookEvent": obj({"object": {"const": "webhook.event"}, "id": _STRING, "type": _STRING}),
    "WebhookSince": obj({"since": {**_INTEGER, "minimum": 0, "description": "Unix seconds."}}, required=["since"]),
    "WebhookReplay": obj({"object": {"const": "webhook.replay"}, "deliveries": _INTEGER}),
    "WebhookAttempt": obj(
        {
            "number": _INTEGER,
            "at": _SECONDS,
            "outcome": {**_STRING, "description": "`delivered`, `refused` (not 2xx), or the code of what went wrong."},
            "status": {"type": ["integer", "null"], "description": "HTTP's; null where there was no answer."},
            "detail": {"type": ["string", "null"], "description": "Why there was no answer."},
            "took_ms": _INTEGER,
        }
    ),
    "WebhookDelivery": obj(_DELIVERY),
    "WebhookDeliveryWhole": obj(
        {
            **_DELIVERY,
            "tries": {"type": "array", "items": ref("WebhookAttempt")},
            "body": obj({"type": _STRING, "timestamp": {**_STRING, "format": "date-time"}, "data": {"type": "object"}}),
        }
    ),
    "WebhookDeliveries": listed("WebhookDelivery"),
}


def _body(schema: str, *, required: bool = True) -> Json:
    return {"required": required, "content": {"application/json": {"schema": ref(schema)}}}


_ID = [path_id("webhook_id")]
_BOTH = [path_id("webhook_id"), path_id("delivery_id")]

PATHS: Json = {
    "/v1/webhooks": {
        "get": operation("List webhooks", "Oldest first.", json_answer("Webhooks"), scope="jobs"),
        "post": operation(
            "Add a webhook",
            "An endpoint that is told what happens. Its secret is told this once.",
            json_answer("WebhookMade", "Added.", "201"),
            scope="jobs",
            requestBody=_body("WebhookRequest"),
        ),
    },
    "/v1/webhooks/{webhook_id}": {
        "get": operation("Show a webhook", "One of the list.", json_answer("Webhook"), scope="jobs", parameters=_ID),
        "patch": operation(
            "Change a webhook",
            "What is left out stays. What is made active again starts afresh.",
            json_answer("Webhook"),
            scope="jobs",
            parameters=_ID,
            requestBody=_body("WebhookChanges"),
        ),
        "delete": operation(
            "Delete a webhook",
            "With its secrets and its log.",
            {"204": {"description": "It is gone."}},
            scope="jobs",
            parameters=_ID,
        ),
    },
    "/v1/webhooks/{webhook_id}/rotate": {
        "post": operation(
            "Rotate a webhook's secret",
            "A fresh one, told this once; the one before signs beside it for a while.",
            json_answer("WebhookMade"),
            scope="jobs",
            parameters=_ID,
            requestBody=_body("WebhookRotation", required=False),
        )
    },
    "/v1/webhooks/{webhook_id}/test": {
        "post": operation(
            "Send a test event",
            "`webhook.test`, whatever events the webhook asked for.",
            json_answer("WebhookEvent", "On its way.", "202"),
            scope="jobs",
            parameters=_ID,
        )
    },
    "/v1/webhooks/{webhook_id}/replay": {
        "post": operation(
            "Replay what was missed",
            "Every event since then that the webhook has asked for and not taken, also from while it was disabled.",
            json_answer("WebhookReplay", "On their way.", "202"),
            scope="jobs",
            parameters=_ID,
            requestBody=_body("WebhookSince"),
        )
    },
    "/v1/webhooks/{webhook_id}/deliveries": {
        "get": operation(
            "List deliveries",
            "What was sent there in the last 30 days, newest first.",
            json_answer("WebhookDeliveries"),
            scope="jobs",
            parameters=[
                *_ID,
                query("status", "Only those.", {"type": "string", "enum": ["pending", "delivered", "failed"]}),
                query("limit", "How many, at most 200.", {"type": "integer", "minimum": 1, "maximum": 200}),
                query("cursor", "`next_cursor` of the page before."),
            ],
        )
    },
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}": {
        "get": operation(
            "Show a delivery",
            "With every try, and the body that is sent.",
            json_answer("WebhookDeliveryWhole"),
            scope="jobs",
            parameters=_BOTH,
        )
    },
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay": {
        "post": operation(
            "Replay a delivery",
            "The same event under the same id once more, whatever has become of it.",
            json_answer("WebhookDelivery", "On its way.", "202"),
            scope="jobs",
            parameters=_BOTH,
        )
    },
}
