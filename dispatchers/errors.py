"""What can go wrong between audio and transcript.

DispatchError
├── AudioError            the recording itself; the caller must change it
│   ├── EmptyAudio · NotAudio · AudioTooShort · AudioTooLong · UnsupportedAudio
├── OptionError           what was asked of the recogniser; another backend may know how
│   ├── UnknownModel · UnsupportedOption
└── BackendError          the recogniser; another backend may do better
    ├── BackendUnavailable (EngineLost · Withdrawn) · BackendTimeout · BackendFailed (BadAnswer)
    ├── Overloaded · Superseded · Throttled · CredentialRefused
    └── BackendRefused        the request itself; no other backend is asked
"""

from __future__ import annotations

from typing import ClassVar

from runtime.errors import StenogateError


class DispatchError(StenogateError):
    """The audio could not be transcribed."""

    elsewhere: ClassVar[bool] = False
    """Whether another backend may do what this one could not."""


class AudioError(DispatchError):
    """The audio cannot be used."""

    code = "UNDECODABLE"


class EmptyAudio(AudioError):
    """The upload is empty. Send an audio file of at least 0.1 seconds."""

    code = "EMPTY_AUDIO"


class NotAudio(AudioError):
    """No audio could be decoded from the upload. Send wav, flac, mp3, m4a, mp4, ogg or webm."""

    code = "UNDECODABLE"


class AudioTooShort(AudioError):
    """The audio is shorter than 0.1 seconds."""

    code = "AUDIO_TOO_SHORT"


class AudioTooLong(AudioError):
    """The audio is longer than the tenant's policy allows."""

    code = "AUDIO_TOO_LONG"
    elsewhere = True


class UnsupportedAudio(AudioError):
    """This kind of audio is not supported. Use 1 to 8 channels at 8 to 192 kHz."""

    code = "UNSUPPORTED_AUDIO"


class OptionError(DispatchError):
    """An option cannot be honoured."""

    code = "BAD_PARAMETERS"
    elsewhere = True


class UnknownModel(OptionError):
    """There is no such model. `GET /v1/models` lists the models you may use."""

    code = "MODEL_NOT_FOUND"


class UnsupportedOption(OptionError):
    """The model does not support what was asked of it."""

    code = "UNSUPPORTED_OPTION"


class BackendError(DispatchError):
    """The recogniser failed."""

    code = "BACKEND_FAILED"
    retryable = True
    elsewhere = True


class BackendUnavailable(BackendError):
    """No backend that the policy allows is available now. Try again shortly."""

    code = "BACKEND_UNAVAILABLE"


class EngineLost(BackendUnavailable):
    """The engine ended while it was at this. It is being started again; try again shortly."""


class Withdrawn(BackendUnavailable):
    """The tenant's policy does not allow this backend any more."""


class BackendTimeout(BackendError):
    """The recogniser did not answer in time. Try again."""

    code = "BACKEND_TIMEOUT"


class BackendFailed(BackendError):
    """The recogniser failed on this audio. Try again."""

    code = "BACKEND_FAILED"


class BadAnswer(BackendFailed):
    """The recogniser's answer cannot be read. Try again."""


class Throttled(BackendError):
    """The provider takes no more requests for now. Try again in a moment."""

    code = "BACKEND_THROTTLED"


class CredentialRefused(BackendError):
    """The provider does not accept the credential it was given. The operator must renew it."""

    code = "CREDENTIAL_REFUSED"
    retryable = False


class Overloaded(BackendError):
    """Every seat is taken. Try again in a few seconds."""

    code = "NO_SEAT"


class Superseded(BackendError):
    """A newer partial of the same stream, or its final, took the place of this one in the queue."""

    code = "SUPERSEDED"


class BackendRefused(BackendError):
    """The recogniser refused the request."""

    code = "BACKEND_REFUSED"
    retryable = False
    elsewhere = False
