"""Everything this package raises on purpose, and the exit code each one becomes.

LowmemGblmError
├── RequestError            2  an option is wrong, or contradicts another
├── CheckpointError         3  the model folder cannot be used
│   └── UnsupportedModel    3  the architecture does not fit the streaming contract
├── BudgetError             4  memory or disk do not suffice
├── JobError                5  the output exists, or belongs to another job
├── NonFiniteError          6  a loss, a hidden state or a score is NaN or infinite
└── VerificationError       7  an output breaks a promise
"""

from __future__ import annotations

INTERRUPTED = 130


class LowmemGblmError(Exception):
    """Base class: the message is a complete sentence for the person at the terminal."""

    exit_code = 1


class RequestError(LowmemGblmError):
    """An option is wrong, or contradicts another one or the model."""

    exit_code = 2


class CheckpointError(LowmemGblmError):
    """The model folder is missing, damaged, or in a format that is refused."""

    exit_code = 3


class UnsupportedModel(CheckpointError):
    """The architecture does not fit the contract of the streaming passes."""


class BudgetError(LowmemGblmError):
    """The run needs more memory or disk than there is."""

    exit_code = 4


class JobError(LowmemGblmError):
    """The output exists already, or is being written by another job."""

    exit_code = 5


class NonFiniteError(LowmemGblmError):
    """A number that must be finite is not."""

    exit_code = 6


class VerificationError(LowmemGblmError):
    """An output checkpoint breaks one of the promises made about it."""

    exit_code = 7
