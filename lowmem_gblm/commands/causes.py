"""Why a run ends early: what kind of error it is, and the error to tell a user."""

from typing import Literal

import torch

from lowmem_gblm.errors import BudgetError, DeviceError, JobError, LowmemGblmError
from lowmem_gblm.runtime.accelerator import is_device_error

Cause = Literal["interrupted", "disk", "device, numbers, model", "job error", "bug"]


def cause_of(error: BaseException) -> tuple[Cause, LowmemGblmError | None]:
    """Return why a run ends, and the error as one of ours where it has one."""
    if isinstance(error, JobError):
        return "job error", error
    if isinstance(error, LowmemGblmError):
        return "device, numbers, model", error
    if not isinstance(error, Exception):
        return "interrupted", None
    if isinstance(error, OSError) and error.errno is not None:
        return "disk", None
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "device, numbers, model", BudgetError(f"out of memory: {first}")
    if is_device_error(error):
        return "device, numbers, model", DeviceError(f"the device has failed: {first}")
    return "bug", None
