"""What each serving stack computes from a config, and which encoding carries learned numbers to it."""

from .advice import config_errors
from .conformance import FREQUENCY_TOLERANCE, MULTIPLIER_TOLERANCE, frequency_error
from .encodings import RopeEncoding
from .rules import v5_sections
from .selection import (
    Target,
    check_mergeable,
    choose_encoding,
    make_representable,
    representable_parameters,
    unserved,
)
from .stacks import STACKS
from .verification import Verification, verify

__all__ = [
    "FREQUENCY_TOLERANCE",
    "MULTIPLIER_TOLERANCE",
    "STACKS",
    "RopeEncoding",
    "Target",
    "Verification",
    "check_mergeable",
    "choose_encoding",
    "config_errors",
    "frequency_error",
    "make_representable",
    "representable_parameters",
    "unserved",
    "v5_sections",
    "verify",
]
