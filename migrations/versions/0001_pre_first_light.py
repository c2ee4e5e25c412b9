"""Tenants and their policies, prices and budgets; sessions, the ledger and the audit log; jobs.

Every tenant table is FORCE row level security with two policies: the app role sees the tenant bound to its transaction,
the system role sees all. What is append-only is so by grant. Every key begins with the tenant, because unique and
foreign keys do not heed row-level security and would otherwise tell one tenant of another's rows.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = """
create extension if not exists btree_gist;

create table tenants (
    id           uuid primary key,
    slug         text not null unique check (slug ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
    name         text not null,
    status       text not null default 'active' check (status in ('active', 'suspended', 'closed')),
    currency     char(3) not null default 'USD' check (currency ~ '^[A-Z]{3}$'),
    billing_tz   text not null default 'UTC',
    created_at   timestamptz not null default now()
);

-- Who may sign tokens for a tenant. The tenant follows from (issuer, audience, claim), never from a claim alone.
create table issuers (
    id                 uuid primary key,
    tenant_id          uuid not null references tenants,
    issuer             text not null,
    audience           text not null,
    jwks_uri           text not null,
    algorithms         text[] not null check (
        cardinality(algorithms) > 0
        and algorithms <@ array['RS256', 'RS384', 'RS512', 'ES256', 'ES384', 'EdDSA']::text[]
    ),
    tenant_claim       text not null,
    tenant_claim_value text not null,
    scopes_claim       text not null default 'scope',
    status             text not null default 'active' check (status in ('active', 'disabled')),
    created_at         timestamptz not null default now(),
    unique (issuer, audience, tenant_claim, tenant_claim_value)
);

create table revoked_tokens (
    tenant_id  uuid not null references tenants,
    token_id   text not null,
    expires_at timestamptz not null,
    revoked_at timestamptz not null default now(),
    primary key (tenant_id, token_id)
);

create table policies (
    tenant_id  uuid not null references tenants,
    version    int not null check (version > 0),
    effective  tstzrange not null,
    body       jsonb not null,
    created_by text not null,
    created_at timestamptz not null default now(),
    primary key (tenant_id, version),
    exclude using gist (tenant_id with =, effective with &&)
);

-- tenant_id null: the list price. Rows are never changed; a new price closes the old one's range.
create table price_book (
    id                  uuid primary key,
    tenant_id           uuid references tenants,
    backend             text not null,
    model               text not null default '*',
    price_nano_per_hour bigint not null check (price_nano_per_hour >= 0),
    cost_nano_per_hour  bigint not null default 0 check (cost_nano_per_hour >= 0),
    currency            char(3) not null,
    effective           tstzrange not null,
    created_by          text not null,
    created_at          timestamptz not null default now(),
    exclude using gist (
        coalesce(tenant_id, '00000000-0000-0000-0000-000000000000'::uuid) with =,
        backend with =, model with =, currency with =, effective with &&
    )
);

create table budgets (
    tenant_id  uuid not null references tenants,
    id         uuid not null,
    period     text not null check (period in ('day', 'month', 'lifetime')),
    limit_nano bigint not null check (limit_nano >= 0),
    hard       boolean not null default true,
    active     boolean not null default true,
    created_at timestamptz not null default now(),
    primary key (tenant_id, id)
);
create unique index budgets_one_active on budgets (tenant_id, period, hard) where active;

create table budget_windows (
    tenant_id    uuid not null,
    budget_id    uuid not null,
    window_start timestamptz not null,
    settled_nano bigint not null default 0 check (settled_nano >= 0),
    held_nano    bigint not null default 0 check (held_nano >= 0),
    primary key (tenant_id, budget_id, window_start),
    foreign key (tenant_id, budget_id) references budgets
);

create table sessions (
    tenant_id      uuid not null references tenants,
    id             uuid not null,
    kind           text not null check (kind in ('file', 'stream', 'job')),
    status         text not null default 'open'
                   check (status in ('open', 'completed', 'failed', 'interrupted', 'cancelled')),
    code           text,
    subject        text not null,
    customer       text,
    metadata       jsonb not null default '{}',
    request_id     text,
    policy_version int not null,
    decision       jsonb not null,
    backend        text,
    engine         text,
    model          text,
    language       text,
    currency       char(3) not null,
    started_at     timestamptz not null default now(),
    seen_at        timestamptz not null default now(),
    ended_at       timestamptz,
    accepted_ms    bigint not null default 0 check (accepted_ms >= 0),
    billed_ms      bigint not null default 0 check (billed_ms >= 0),
    held_ms        bigint not null default 0 check (held_ms >= 0),
    segments       int not null default 0,
    utterances     int not null default 0,
    words          int not null default 0,
    text           text,
    primary key (tenant_id, id),
    foreign key (tenant_id, policy_version) references policies (tenant_id, version)
);
create index sessions_by_time on sessions (tenant_id, started_at desc, id desc);
create index sessions_open on sessions (seen_at) where status = 'open';

create table budget_holds (
    tenant_id    uuid not null,
    session_id   uuid not null,
    budget_id    uuid not null,
    window_start timestamptz not null,
    amount_nano  bigint not null check (amount_nano >= 0),
    state        text not null default 'open' check (state in ('open', 'released')),
    created_at   timestamptz not null default now(),
    primary key (tenant_id, session_id, budget_id),
    foreign key (tenant_id, session_id) references sessions,
    foreign key (tenant_id, budget_id, window_start) references budget_windows
);
create index budget_holds_open on budget_holds (tenant_id, session_id) where state = 'open';

-- The anchor against double charging: a segment of a session is a key here at most once, whoever delivers it.
create table usage_keys (
    tenant_id  uuid not null,
    source_id  uuid not null,
    segment_no int not null,
    kind       text not null,
    primary key (tenant_id, source_id, segment_no, kind)
);

create table usage_ledger (
    seq                 bigint generated always as identity primary key,
    tenant_id           uuid not null,
    ledger_day          date not null,
    source_id           uuid not null,
    segment_no          int not null check (segment_no >= 0),
    kind                text not null check (kind in ('usage', 'adjustment', 'reversal', 'minimum', 'true_up')),
    customer            text,
    backend             text not null,
    model               text not null,
    start_ms            bigint not null check (start_ms >= 0),
    end_ms              bigint not null check (end_ms > start_ms),
    audio_ms            bigint not null,
    billed_ms           bigint not null,
    price_id            uuid not null references price_book,
    price_nano_per_hour bigint not null,
    amount_nano         bigint not null,
    cost_nano           bigint not null,
    currency            char(3) not null,
    recorded_at         timestamptz not null default now(),
    check (kind <> 'usage' or (audio_ms >= 0 and billed_ms >= 0 and amount_nano >= 0 and audio_ms = end_ms - start_ms)),
    foreign key (tenant_id, source_id) references sessions (tenant_id, id)
);
create index usage_ledger_by_day on usage_ledger (tenant_id, ledger_day);
create index usage_ledger_by_source on usage_ledger (tenant_id, source_id, segment_no);

create table audit_log (
    seq        bigint generated always as identity primary key,
    at         timestamptz not null default now(),
    tenant_id  uuid references tenants,
    actor      text not null,
    action     text not null,
    object     text not null,
    before     jsonb,
    after      jsonb,
    request_id text
);
create index audit_log_by_tenant on audit_log (tenant_id, seq);

-- A job has its session's id.
create table jobs (
    tenant_id   uuid not null,
    id          uuid not null,
    status      text not null default 'queued'
                check (status in ('queued', 'running', 'completed', 'failed', 'cancelled')),
    options     jsonb not null,
    fingerprint text not null,
    blob_key    text, -- null once the recording is gone
    filename    text,
    size_bytes  bigint not null,
    audio_ms    bigint,
    done_ms     bigint not null default 0,
    attempts    int not null default 0,
    lease_token uuid,
    lease_until timestamptz,
    run_after   timestamptz not null default now(),
    created_at  timestamptz not null default now(),
    started_at  timestamptz,
    finished_at timestamptz,
    error       jsonb,
    transcript  jsonb,
    primary key (tenant_id, id),
    foreign key (tenant_id, id) references sessions
);
create index jobs_by_time on jobs (tenant_id, created_at desc, id desc);
create index jobs_waiting on jobs (run_after, id) where status in ('queued', 'running');
create index jobs_recordings_left on jobs (finished_at) where blob_key is not null;
create index jobs_by_fingerprint on jobs (tenant_id, fingerprint, created_at desc);

create table job_chunks (
    tenant_id  uuid not null,
    job_id     uuid not null,
    chunk_no   int not null,
    start_ms   bigint not null,
    end_ms     bigint not null check (end_ms > start_ms),
    language   text not null,
    segments   jsonb not null,
    origin     jsonb not null,
    done_at    timestamptz not null default now(),
    primary key (tenant_id, job_id, chunk_no),
    foreign key (tenant_id, job_id) references jobs (tenant_id, id) on delete cascade
);
"""

MINE = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"

# table: (what its row must equal for the app role to see it, app's grants, system's grants)
ACCESS = {
    "tenants": (f"id = {MINE}", "select", "select, insert, update (name, status, currency, billing_tz)"),
    "issuers": (f"tenant_id = {MINE}", "select", "select, insert, update (status)"),
    "revoked_tokens": (f"tenant_id = {MINE}", "select, insert", "select, insert, delete"),
    "policies": (f"tenant_id = {MINE}", "select", "select, insert, update (effective)"),
    "price_book": (f"tenant_id is null or tenant_id = {MINE}", "select", "select, insert, update (effective)"),
    "budgets": (f"tenant_id = {MINE}", "select", "select, insert, update (limit_nano, hard, active)"),
    "budget_windows": (f"tenant_id = {MINE}", "select, insert, update", "select, update"),
    "budget_holds": (f"tenant_id = {MINE}", "select, insert, update", "select, update"),
    "sessions": (f"tenant_id = {MINE}", "select, insert, update", "select, update"),
    "usage_keys": (f"tenant_id = {MINE}", "select, insert", "select"),
    "usage_ledger": (f"tenant_id = {MINE}", "select, insert", "select"),
    "audit_log": (f"tenant_id = {MINE}", "select, insert", "select, insert"),
    "jobs": (f"tenant_id = {MINE}", "select, insert, update, delete", "select, update"),
    "job_chunks": (f"tenant_id = {MINE}", "select, insert, delete", "select"),
}


def _role(setting: str) -> str:
    query = f"select quote_ident(current_setting('stenogate.{setting}'))"
    name: str = op.get_bind().exec_driver_sql(query).scalar_one()
    return name


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
    app, system = _role("app_role"), _role("system_role")
    op.execute(f"grant usage on schema public to {app}, {system}")
    for table, (mine, app_grants, system_grants) in ACCESS.items():
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(f"create policy tenant on {table} to {app} using ({mine}) with check ({mine})")
        op.execute(f"create policy system on {table} to {system} using (true) with check (true)")
        op.execute(f"grant {app_grants} on {table} to {app}")
        op.execute(f"grant {system_grants} on {table} to {system}")


def downgrade() -> None:
    for table in reversed(ACCESS):
        op.execute(f"drop table {table} cascade")
