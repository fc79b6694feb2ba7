"""What a run will take, by arithmetic alone: choices, bytes, FLOPs, seconds; or a refusal."""

from lowmem_gblm.planning.choose import plan
from lowmem_gblm.planning.duration import Speeds
from lowmem_gblm.planning.plan import Budget, Needs, Plan
from lowmem_gblm.planning.sizes import (
    FLOAT32_BYTES,
    STORES,
    Choices,
    ModelSizes,
    StoreKind,
    Work,
    slices_within,
)
from lowmem_gblm.planning.words import gibibytes

__all__ = [
    "FLOAT32_BYTES",
    "STORES",
    "Budget",
    "Choices",
    "ModelSizes",
    "Needs",
    "Plan",
    "Speeds",
    "StoreKind",
    "Work",
    "gibibytes",
    "plan",
    "slices_within",
]
