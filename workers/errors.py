"""What can go wrong with a durable job, beside what dispatching and policy raise."""

from __future__ import annotations

from runtime.errors import StenogateError


class JobError(StenogateError):
    """The job could not be done."""


class JobNotFound(JobError):
    """There is no such job."""

    code = "NOT_FOUND"


class JobNotReady(JobError):
    """The job has no transcript yet. Ask again when its status is `completed`."""

    code = "JOB_NOT_READY"
    retryable = True


class JobFailed(JobError):
    """The job failed and has no transcript."""

    code = "JOB_FAILED"


class LeaseLost(JobError):
    """Another worker holds this job now."""

    code = "LEASE_LOST"


class WorkersLost(JobFailed):
    """Every worker that tried this recording was lost while at it."""


class Unheard(JobError):
    """No worker can be told of the job now; one will find it later."""
