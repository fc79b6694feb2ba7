"""The errors that this package raises on purpose, and the exit code of each."""

INTERRUPTED = 130
_LONGEST_NAME = 160
_LONGEST_REASON = 400
_LONGEST_LINE = 2000


def shown(value: object, longest: int = _LONGEST_NAME) -> str:
    """Return a value from a file as a part of a sentence: in one line, printable, not too long.

    Names are untrusted: a line break would forge a second message, a control character would
    reach the terminal, and a name can be megabytes long.
    """
    text = str(value)
    if len(text) > longest:
        half = longest // 2
        head, tail = shown(text[:half], half), shown(text[-half:], half)
        return f"{head}…{tail} ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def shown_value(value: object) -> str:
    """Return a value from JSON as `shown` does."""
    try:
        return shown(repr(value))
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error as `shown`, and the next after a heading."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    count = 2 if lines[0].rstrip().endswith(":") else 1
    return shown(" ".join(line.strip() for line in lines[:count]), _LONGEST_REASON)


class LowmemGblmError(Exception):
    """Base class: the message is a complete sentence for the user."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(shown(message, _LONGEST_LINE))


class RequestError(LowmemGblmError):
    """An option is wrong, or contradicts another one or the model."""

    exit_code = 2


class UsageError(RequestError):
    """A command line cannot be parsed; `usage` is that of its command."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class CheckpointError(LowmemGblmError):
    """The model folder is missing, damaged, or in a format that is refused."""

    exit_code = 3


class UnsupportedModel(CheckpointError):
    """The architecture does not fit the contract of the streaming passes."""


class BudgetError(LowmemGblmError):
    """The run needs more memory or disk than there is."""

    exit_code = 4


class DiskFull(BudgetError):
    """The disk or a quota was used up in the middle of a run; what was done is kept."""


class DiskError(LowmemGblmError):
    """A disk fails in the middle of a run, or may no longer be written; what was done is kept."""

    exit_code = 2


class DeviceError(LowmemGblmError):
    """A GPU or its driver fails in the middle of a run; what was done is kept."""

    exit_code = 2


class JobError(LowmemGblmError):
    """The output exists, or is another job's; or saved statistics do not serve."""

    exit_code = 5


class NonFiniteError(LowmemGblmError):
    """A loss, a hidden state, a score or a weight is NaN or infinite."""

    exit_code = 6


class UploadError(LowmemGblmError):
    """The Hub cannot be reached, refuses, or has other weights in the repository."""

    exit_code = 2


class VerificationError(LowmemGblmError):
    """An output checkpoint breaks its promises: the message has a line for each."""

    exit_code = 7

    def __init__(self, message: str) -> None:
        lines = (shown(line, _LONGEST_LINE) for line in message.split("\n"))
        Exception.__init__(self, "\n".join(lines))
