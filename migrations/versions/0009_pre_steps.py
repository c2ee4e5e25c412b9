"""The two steps that every session takes, as functions: a request then waits for the database twice, and no more.

They run with the rights of whoever calls them and bind the tenant for their own transaction, so row-level security
holds in them as everywhere. A later version of one gets a name of its own, so that the previous release's code keeps
its.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

WINDOW_START = (
    "case b.period when 'lifetime' then timestamptz 'epoch' else date_trunc(b.period, {at}, t.billing_tz) end"
)

# Nothing is inserted unless all that the caller knew is so. A window that is not there yet, or has no room, shows in
# the counts; `fits` is of the row as it is once locked.
OPEN = f"""
create function open_session_1(
    p_tenant uuid, p_token text, p_session uuid, p_kind text, p_subject text, p_customer text, p_metadata jsonb,
    p_request text, p_policy int, p_decision jsonb, p_backends text[], p_models text[], p_prices uuid[],
    p_currency text, p_channels smallint, p_held_ms bigint, p_held_nano bigint
) returns timestamptz language plpgsql as $body$
declare
    began timestamptz;
    asked int;
    met int;
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    with tenant as (
        select t.id from tenants t
        where t.id = p_tenant and t.status = 'active' and t.currency = p_currency
          and not exists (select from revoked_tokens r where r.tenant_id = p_tenant and r.token_id = p_token)
          and not exists (
              select from unnest(p_backends, p_models, p_prices) as candidate (backend, model, price)
              where candidate.price is distinct from (
                  select p.id from price_book p
                  where (p.tenant_id is null or p.tenant_id = p_tenant) and p.backend = candidate.backend
                    and p.model in ('*', candidate.model) and p.currency = p_currency and p.effective @> now()
                  order by p.tenant_id is null, p.model = '*' limit 1
              )
          )
    ), session as (
        insert into sessions (tenant_id, id, kind, subject, customer, metadata, request_id, policy_version, decision,
                              currency, channels, held_ms)
        select p_tenant, p_session, p_kind, p_subject, p_customer, p_metadata, p_request, p_policy, p_decision,
               p_currency, p_channels, p_held_ms
        from tenant
        returning started_at
    ), mine as (
        select b.id, b.hard, b.limit_nano, {WINDOW_START.format(at="s.started_at")} as window_start
        from session s join tenants t on t.id = p_tenant join budgets b on b.tenant_id = p_tenant and b.active
    ), fitting as (
        select w.budget_id, w.window_start,
               not mine.hard or w.settled_nano + w.held_nano + p_held_nano <= mine.limit_nano as fits
        from mine join budget_windows w
             on w.tenant_id = p_tenant and w.budget_id = mine.id and w.window_start = mine.window_start
        order by w.budget_id for update of w
    ), noted as (
        insert into budget_holds (tenant_id, session_id, budget_id, window_start, amount_nano)
        select p_tenant, p_session, f.budget_id, f.window_start, p_held_nano from fitting f where f.fits
    ), held as (
        update budget_windows w set held_nano = w.held_nano + p_held_nano
        from fitting f
        where w.tenant_id = p_tenant and w.budget_id = f.budget_id and w.window_start = f.window_start and f.fits
        returning w.budget_id
    )
    select (select s.started_at from session s), (select count(*) from mine), (select count(*) from held)
    into began, asked, met;
    if began is null or asked <> met then
        raise exception 'unusual' using errcode = 'SG001';
    end if;
    return began;
end $body$
"""  # noqa: S608  constants only

# `p_status` is null while the session goes on.
SETTLE = f"""
create function settle_session_1(
    p_tenant uuid, p_session uuid, p_turn int, p_segment int, p_start_ms bigint, p_end_ms bigint, p_billed_ms bigint,
    p_channels smallint, p_backend text, p_model text, p_customer text, p_price uuid, p_price_nano bigint,
    p_amount bigint, p_cost bigint, p_currency text, p_held_nano bigint, p_status text, p_code text, p_engine text,
    p_language text, p_utterances int, p_words int, p_text text, p_legs jsonb,
    out all_billed_ms bigint, out all_held_ms bigint, out free_nano bigint, out active boolean
) language plpgsql as $body$
begin
    perform set_config('app.tenant_id', p_tenant::text, true);
    with session as (
        select s.id from sessions s
        where s.tenant_id = p_tenant and s.id = p_session and s.status = 'open' and s.turn = p_turn
          and s.segments = p_segment and s.accepted_ms = p_start_ms
        for no key update
    ), key as (
        insert into usage_keys (tenant_id, source_id, segment_no, kind)
        select p_tenant, s.id, p_segment, 'usage' from session s
        on conflict do nothing
        returning source_id
    ), written as (
        update sessions s
        set accepted_ms = p_end_ms, billed_ms = s.billed_ms + p_billed_ms, segments = s.segments + 1,
            held_ms = greatest(s.held_ms, p_end_ms), seen_at = now(), backend = p_backend, model = p_model,
            status = coalesce(p_status, s.status), ended_at = case when p_status is not null then now() end,
            code = coalesce(p_code, s.code), engine = coalesce(p_engine, s.engine),
            language = coalesce(p_language, s.language), utterances = coalesce(p_utterances, s.utterances),
            words = coalesce(p_words, s.words), text = coalesce(p_text, s.text)
        from key where s.tenant_id = p_tenant and s.id = key.source_id
        returning s.id, s.started_at, s.billed_ms, s.held_ms
    ), entry as (
        insert into usage_ledger (tenant_id, ledger_day, source_id, segment_no, kind, customer, backend, model,
                                  start_ms, end_ms, audio_ms, billed_ms, price_id, price_nano_per_hour,
                                  amount_nano, cost_nano, currency, channels)
        select p_tenant, cast(w.started_at at time zone 'UTC' as date), w.id, p_segment, 'usage', p_customer,
               p_backend, p_model, p_start_ms, p_end_ms, p_end_ms - p_start_ms, p_billed_ms, p_price, p_price_nano,
               p_amount, p_cost, p_currency, p_channels
        from written w
        returning source_id
    ), held as (
        select h.budget_id, h.window_start,
               case when p_status is null then least(h.amount_nano, p_held_nano) else h.amount_nano end as freed
        from entry
        join budget_holds h on h.tenant_id = p_tenant and h.session_id = p_session and h.state = 'open'
        join budget_windows w
             on w.tenant_id = p_tenant and w.budget_id = h.budget_id and w.window_start = h.window_start
        order by h.budget_id for update of h, w
    ), lowered as (
        update budget_holds h
        set amount_nano = h.amount_nano - held.freed,
            state = case when p_status is null then h.state else 'released' end
        from held where h.tenant_id = p_tenant and h.session_id = p_session and h.budget_id = held.budget_id
    ), moved as (
        update budget_windows w set held_nano = w.held_nano - held.freed, settled_nano = w.settled_nano + p_amount
        from held
        where w.tenant_id = p_tenant and w.budget_id = held.budget_id and w.window_start = held.window_start
        returning w.budget_id, w.settled_nano + w.held_nano as spent_nano
    ), attempts as (
        insert into legs (tenant_id, session_id, id, backend, model, credential_id, outcome, start_ms, audio_ms,
                          charged_ms, took_ms, cost_nano, currency)
        select p_tenant, w.id, leg.* from written w cross join jsonb_to_recordset(p_legs) as leg (
            id uuid, backend text, model text, credential_id uuid, outcome text, start_ms bigint, audio_ms bigint,
            charged_ms bigint, took_ms bigint, cost_nano bigint, currency text
        )
        on conflict do nothing
    )
    select s.billed_ms, s.held_ms, t.status = 'active',
           (select min(b.limit_nano - coalesce(moved.spent_nano, w.settled_nano + w.held_nano, 0))
            from budgets b left join moved on moved.budget_id = b.id
            left join budget_windows w on w.tenant_id = p_tenant and w.budget_id = b.id
                 and w.window_start = {WINDOW_START.format(at="s.started_at")}
            where b.tenant_id = p_tenant and b.active and b.hard)
    into all_billed_ms, all_held_ms, active, free_nano
    from written s join entry on true join tenants t on t.id = p_tenant;
    if not found then
        raise exception 'unusual' using errcode = 'SG001';
    end if;
end $body$
"""  # noqa: S608
FUNCTIONS = {"open_session_1": OPEN, "settle_session_1": SETTLE}


def _role(setting: str) -> str:
    query = f"select quote_ident(current_setting('stenogate.{setting}'))"
    name: str = op.get_bind().exec_driver_sql(query).scalar_one()
    return name


def upgrade() -> None:
    app = _role("app_role")
    op.execute(
        "create index price_book_of_tenant on price_book (tenant_id, backend, currency)"
    )  # asked at each opening
    for name, function in FUNCTIONS.items():
        op.get_bind().exec_driver_sql(function)
        op.execute(f"revoke execute on function {name} from public")
        op.execute(f"grant execute on function {name} to {app}")


def downgrade() -> None:
    for name in FUNCTIONS:
        op.execute(f"drop function {name}")
    op.execute("drop index price_book_of_tenant")
