"""The plan and the cost of a run, and a first recipe for a model."""

from .cost import Cost, estimate_cost
from .memory import step_memory
from .plan_text import Plan
from .results_cost import ResultsCost, estimate_results
from .run_plan import plan
from .shape import Shape
from .starter import Hardware, Proposal, propose

__all__ = [
    "Cost",
    "Hardware",
    "Plan",
    "Proposal",
    "ResultsCost",
    "Shape",
    "estimate_cost",
    "estimate_results",
    "plan",
    "propose",
    "step_memory",
]
