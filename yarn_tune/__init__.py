"""yarn_tune: learn RoPE's scale and the attention temperature of a frozen model.

The names here do what the commands do. They are loaded when they are first used, so that `import yarn_tune` costs
nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import YarnTuneConfig
    from .api import Tuning
    from .errors import CheckFailed, Interrupted, UserError
    from .planning import propose
    from .serving import verify

_PLACES = {
    "CheckFailed": "errors",
    "Interrupted": "errors",
    "Tuning": "api",
    "UserError": "errors",
    "YarnTuneConfig": "adapter",  # importing which also tells PEFT how to load one
    "propose": "planning",
    "verify": "serving",
}

__all__ = ["CheckFailed", "Interrupted", "Tuning", "UserError", "YarnTuneConfig", "propose", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'yarn_tune' has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
