"""yarn_tune: extend the context window of a frozen RoPE model by learning a few numbers.

The names below do what the commands do. Each is imported on first use, so that `import yarn_tune` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .adapter import YarnTuneConfig
    from .api import Tuning
    from .errors import CheckFailed, Interrupted, UserError
    from .planning import Hardware, propose
    from .serving import verify

_PLACES = {
    "CheckFailed": "errors",
    "Hardware": "planning",
    "Interrupted": "errors",
    "Tuning": "api",
    "UserError": "errors",
    "YarnTuneConfig": "adapter",  # the import registers the type with PEFT
    "propose": "planning",
    "verify": "serving",
}

__all__ = [
    "CheckFailed",
    "Hardware",
    "Interrupted",
    "Tuning",
    "UserError",
    "YarnTuneConfig",
    "__version__",
    "propose",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'yarn_tune' has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
