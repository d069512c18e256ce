"""Process groups, sharded weights, activation memory and signals."""

from .activation_memory import checkpoint_layers, offload_inputs, tile_mlps
from .processes import World, environment, report_lost_peers, start
from .sharding import Release, Sharding, check_weights, loading, spread, world_text
from .signals import Request, stop_on_signal

__all__ = [
    "Release",
    "Request",
    "Sharding",
    "World",
    "check_weights",
    "checkpoint_layers",
    "environment",
    "loading",
    "offload_inputs",
    "report_lost_peers",
    "spread",
    "start",
    "stop_on_signal",
    "tile_mlps",
    "world_text",
]
