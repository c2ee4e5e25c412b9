"""Every refusal of the policy package.

PolicyError
├── IdentityError         who is calling; says nothing that helps an attacker
│   ├── TokenMissing · TokenInvalid · TokenExpired · TokenRevoked
├── Forbidden             known, and not allowed
│   ├── ScopeMissing · TenantSuspended · NotAllowed · NotOperator
├── LimitReached          allowed, and too much of it
│   ├── BudgetExhausted · RateLimited · ConcurrencyLimited
├── NoPrice               nothing is ever sold at an accidental zero
├── NotFound              no such object, or another tenant's
│   ├── ModelNotFound
│   └── AudioNotKept
├── AudioNotReady         a session's audio, while the session goes on
├── AudioGone             a session's audio, after its time
├── NothingUp             everything that is allowed is down
├── LedgerUnavailable     the database cannot be reached, so nothing can be sold
├── Conflict              it exists already, or is in a state that forbids this
│   ├── SettingFixed      it is read once, when a process starts
│   └── TakenOver         somebody else goes on with the session
└── Invalid               a value that cannot be accepted
"""

from __future__ import annotations

from runtime.errors import StenogateError


class PolicyError(StenogateError):
    """The request is against policy."""


class IdentityError(PolicyError):
    """The token was not accepted."""

    code = "TOKEN_INVALID"


class TokenMissing(IdentityError):
    """No token was sent. Send `Authorization: Bearer <token>`."""

    code = "TOKEN_MISSING"


class TokenInvalid(IdentityError):
    """The token was not accepted."""


class TokenExpired(IdentityError):
    """The token has expired. Ask for a new one."""

    code = "TOKEN_EXPIRED"


class TokenRevoked(IdentityError):
    """The token was revoked."""

    code = "TOKEN_REVOKED"


class Forbidden(PolicyError):
    """The tenant's policy forbids this."""

    code = "FORBIDDEN"


class ScopeMissing(Forbidden):
    """The token lacks the scope that this call needs."""


class TenantSuspended(Forbidden):
    """The tenant is suspended."""

    code = "TENANT_SUSPENDED"


class NotAllowed(Forbidden):
    """The tenant's policy does not allow this backend, model or feature."""


class NotOperator(Forbidden):
    """This call is the operator's: it needs a token of `stenogate token --operator`."""


class LimitReached(PolicyError):
    """A limit of the tenant's policy is reached."""

    code = "RATE_LIMITED"


class BudgetExhausted(LimitReached):
    """The budget does not cover this audio."""

    code = "BUDGET_EXHAUSTED"


class RateLimited(LimitReached):
    """Too many requests. Slow down and try again."""

    code = "RATE_LIMITED"
    retryable = True


class ConcurrencyLimited(LimitReached):
    """Too many requests or streams at once. Try again when one has ended."""

    code = "CONCURRENCY_LIMITED"
    retryable = True


class NoPrice(PolicyError):
    """No price is set for this backend and model, so it is not for sale."""

    code = "NO_PRICE"


class NotFound(PolicyError):
    """There is no such object."""

    code = "NOT_FOUND"


class ModelNotFound(NotFound):
    """There is no such model. `GET /v1/models` lists the models you may use."""

    code = "MODEL_NOT_FOUND"


class AudioNotKept(NotFound):
    """No audio of this session was kept. Only live sessions keep theirs, where the tenant's policy says so."""

    code = "AUDIO_NOT_KEPT"


class AudioNotReady(PolicyError):
    """The session's audio is still being recorded. Ask again when the session has ended."""

    code = "AUDIO_NOT_READY"
    retryable = True


class AudioGone(PolicyError):
    """The session's audio was kept and has been deleted."""

    code = "AUDIO_GONE"


class NothingUp(PolicyError):
    """No backend that the tenant's policy allows is available now. Try again shortly."""

    code = "BACKEND_UNAVAILABLE"
    retryable = True


class Conflict(PolicyError):
    """The object exists already, or its state forbids this."""

    code = "CONFLICT"


class SettingFixed(Conflict):
    """The setting is read once, when a process starts."""

    code = "SETTING_FIXED"


class TakenOver(Conflict):
    """The session was resumed on another connection."""

    code = "SESSION_TAKEN_OVER"


class Invalid(PolicyError):
    """A value cannot be accepted."""

    code = "BAD_PARAMETERS"


class LedgerUnavailable(PolicyError):
    """The database cannot be reached. Try again in a few seconds."""

    code = "DATABASE_UNAVAILABLE"
    retryable = True
