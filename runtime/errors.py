"""The root of every error Stenogate raises on purpose.

    StenogateError
    ├── policy.errors.PolicyError          who may do what, and what it costs
    ├── dispatchers.errors.DispatchError   audio in, transcript out
    ├── workers.errors.JobError            durable work
    ├── UrlError                           what lies at a URL that a caller named
    │   ├── UrlRefused · UrlUnreachable · UrlTooLarge
    └── Misconfigured                      settings that do not fit together
        └── Unsealable                     a secret at rest that they do not open

A class says once, for every protocol, its `code` and whether the same request may succeed later (`retryable`). Its
docstring is its default message, so it is written for the person who will read it. `gateway.errors` translates the
tree into each protocol's shape, and a test walks the tree to prove that translation total.
"""

from __future__ import annotations

import inspect
from typing import ClassVar


class StenogateError(Exception):
    """Something went wrong inside Stenogate."""

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, *, param: str | None = None, retry_after_s: float | None = None):
        self.message = message or inspect.cleandoc(type(self).__doc__ or "")
        self.param = param
        self.retry_after_s = retry_after_s
        super().__init__(self.message)


class Misconfigured(StenogateError):
    """The settings do not fit together."""

    code = "MISCONFIGURED"


class Unsealable(Misconfigured):
    """What is sealed does not open: its master key is another one now, or it was changed since it was sealed."""


class UrlError(StenogateError):
    """The URL cannot be used."""

    code = "URL_REFUSED"


class UrlRefused(UrlError):
    """The URL leads where we do not go. It must be https, to a public address; the operator may allow others."""


class UrlUnreachable(UrlError):
    """The URL's host cannot be reached."""

    code = "URL_UNREACHABLE"
    retryable = True


class UrlTooLarge(UrlError):
    """What lies at the URL is too large."""

    code = "TOO_LARGE"
