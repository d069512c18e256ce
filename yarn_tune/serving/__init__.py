"""What each serving stack computes from a config, and which encoding carries learned numbers to it."""

from .encodings import EXTRA_KEYS, RopeEncoding
from .selection import Target, choose_encoding, make_representable, representable_parameters
from .verification import Verification, verify
from .vllm import TOLERANCE, ask_vllm

__all__ = [
    "EXTRA_KEYS",
    "TOLERANCE",
    "RopeEncoding",
    "Target",
    "Verification",
    "ask_vllm",
    "choose_encoding",
    "make_representable",
    "representable_parameters",
    "verify",
]
