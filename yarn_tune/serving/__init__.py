"""What each serving stack computes from a config, and which encoding carries learned numbers to it."""

from .encodings import EXTRA_KEYS, Served
from .selection import Target, serve, settle, settle_trained
from .verify import Verification, verify
from .vllm import TOLERANCE, ask_vllm

__all__ = [
    "EXTRA_KEYS",
    "TOLERANCE",
    "Served",
    "Target",
    "Verification",
    "ask_vllm",
    "serve",
    "settle",
    "settle_trained",
    "verify",
]
