"""The plan and the cost of a run, and a first recipe for a model."""

from .cost import Cost, estimate_cost
from .memory import step_memory
from .plan_text import Plan
from .run_plan import plan
from .shape import Shape
from .starter import Hardware, Proposal, propose

__all__ = ["Cost", "Hardware", "Plan", "Proposal", "Shape", "estimate_cost", "plan", "propose", "step_memory"]
