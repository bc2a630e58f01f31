"""The error tree. Every error that Perennial raises on purpose is one of these.

    PerennialError
    ├── InputError (ValueError)            a caller sent something that cannot be accepted
    │   ├── ConfigError                    a setting is unknown, missing or of the wrong type
    │   ├── MalformedError                 a body is not JSON in UTF-8
    │   └── TooLargeError                  a body, batch or text exceeds its limit
    ├── IntegrityError (ValueError)        a file does not have the digest it should have
    ├── NotFoundError (LookupError)        no such thing, or it belongs to somebody else
    ├── ModelMissingError (FileNotFoundError)  model weights are not on this machine
    ├── AuthError (PermissionError)        no valid API key
    ├── ForbiddenError (PermissionError)   a valid key without the scope
    ├── ConflictError (RuntimeError)       a compare-and-set lost, or a key was reused
    ├── LeaseLostError (RuntimeError)      another worker owns the round now
    ├── StepError (RuntimeError)           a step of a round failed
    ├── TrainingError (RuntimeError)       a training run or its process failed
    │   ├── DivergedError                  its loss or its KL went out of bounds
    │   └── OutOfMemoryError               the machine had no memory for one row alone
    ├── RateLimitedError (RuntimeError)    one caller sends too much: try again later
    └── UnavailableError (ConnectionError) a store or server cannot be reached: try again
        └── OverloadedError                too much waits already; nothing was taken

Each inherits the standard kind as well, so that callers may catch either. `code` is stable and
documented in docs/api.md. Errors pickle, because they cross process borders.
"""

from typing import ClassVar

Field = str | int | float | None


class PerennialError(Exception):
    """Base of the tree; `fields` holds the values that the message names."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, **fields: Field) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __reduce__(self) -> tuple[object, tuple[type, str, dict[str, Field]]]:
        return (_rebuild, (type(self), self.message, self.fields))


class InputError(PerennialError, ValueError):
    """A caller sent something that cannot be accepted."""

    code = "input_invalid"


class ConfigError(InputError):
    """A setting is unknown, missing or of the wrong type."""

    code = "config_invalid"


class MalformedError(InputError):
    """A body is not JSON in UTF-8."""

    code = "malformed"


class TooLargeError(InputError):
    """A body, batch or text exceeds its limit."""

    code = "too_large"


class IntegrityError(PerennialError, ValueError):
    """A file does not have the digest it should have."""

    code = "integrity_failed"


class NotFoundError(PerennialError, LookupError):
    """No such thing, or it belongs to somebody else."""

    code = "not_found"


class ModelMissingError(PerennialError, FileNotFoundError):
    """Model weights are not on this machine."""

    code = "model_missing"


class AuthError(PerennialError, PermissionError):
    """No valid API key."""

    code = "unauthenticated"


class ForbiddenError(PerennialError, PermissionError):
    """A valid API key without the scope that the route asks for."""

    code = "forbidden"


class ConflictError(PerennialError, RuntimeError):
    """A compare-and-set lost, or a key was used again for another payload."""

    code = "conflict"


class LeaseLostError(PerennialError, RuntimeError):
    """Another worker owns the round now."""

    code = "lease_lost"


class StepError(PerennialError, RuntimeError):
    """A step of a round failed."""

    code = "step_failed"


class TrainingError(PerennialError, RuntimeError):
    """A training run or its process failed."""

    code = "training_failed"


class DivergedError(TrainingError):
    """The loss is not finite or climbs, or the KL budget is spent: other settings are needed."""

    code = "diverged"


class OutOfMemoryError(TrainingError):
    """Memory is refused for one row alone; it depends on what else the machine does."""

    code = "out_of_memory"


class UnavailableError(PerennialError, ConnectionError):
    """A store or server cannot be reached; trying again later may help."""

    code = "unavailable"


class OverloadedError(UnavailableError):
    """Too much waits already, or the disk is almost full; nothing was taken."""

    code = "overloaded"


class RateLimitedError(PerennialError, RuntimeError):
    """One API key or subject sends more than its share."""

    code = "rate_limited"


def _rebuild(kind: type[PerennialError], message: str, fields: dict[str, Field]) -> PerennialError:
    return kind(message, **fields)
