"""`/v1/usage`: what the ledger says."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.api.query import day
from gateway.auth import caller_of
from gateway.state import gateway_of
from policy import metering, tenants

GROUPED_BY = "day,backend,model"


async def usage(request: Request) -> Response:
    """Audio and money by day, backend, model or customer. Days are UTC; `to` itself is not included."""
    caller = await caller_of(request, "usage")
    start, end = day(request, "from"), day(request, "to")
    group_by = [name.strip() for name in (request.query_params.get("group_by") or GROUPED_BY).split(",")]
    customer = request.query_params.get("customer") or None
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        tenant = await tenants.by_id(tx, caller.tenant_id)
        rows = await metering.usage(tx, caller.tenant_id, start=start, end=end, group_by=group_by, customer=customer)
    return JSONResponse({"object": "usage", "currency": tenant.currency, "data": [row.as_json() for row in rows]})


routes: list[BaseRoute] = [Route("/v1/usage", usage)]
