"""What a run costs and covers, and a first recipe for a model."""

from .cost import estimate_cost, step_memory
from .run_plan import Plan, plan
from .starter import propose

__all__ = ["Plan", "estimate_cost", "plan", "propose", "step_memory"]
