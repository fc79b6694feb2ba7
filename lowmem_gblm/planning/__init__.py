"""The needs of a run, by arithmetic alone: choices, bytes, FLOPs, seconds; or a refusal."""

from lowmem_gblm.planning.messages import gibibytes
from lowmem_gblm.planning.plan import Budget, Plan, Requirements
from lowmem_gblm.planning.planner import plan
from lowmem_gblm.planning.run_time import MachineSpeed
from lowmem_gblm.planning.sizes import (
    FLOAT32_BYTES,
    STORES,
    ActivationCost,
    Choices,
    DecisionCost,
    GradientPrecision,
    ModelSizes,
    Workload,
    slices_within,
)

__all__ = [
    "FLOAT32_BYTES",
    "STORES",
    "ActivationCost",
    "Budget",
    "Choices",
    "DecisionCost",
    "GradientPrecision",
    "MachineSpeed",
    "ModelSizes",
    "Plan",
    "Requirements",
    "Workload",
    "gibibytes",
    "plan",
    "slices_within",
]
