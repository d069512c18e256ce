"""Perplexity, retrieval, the comparison of methods, and its report."""

from .compare import compare, named_rows
from .perplexity import Nats, bucket_edges, by_position, full_nats, slid_nats
from .report import write_report
from .results import Comparison, as_json, of_json, table
from .retrieval import heat_map, retrieve, score_server, score_transformers, table
from .sweep import check_factors, sweep, sweep_table

__all__ = [
    "Comparison",
    "Nats",
    "as_json",
    "bucket_edges",
    "by_position",
    "check_factors",
    "compare",
    "full_nats",
    "heat_map",
    "named_rows",
    "of_json",
    "retrieve",
    "score_server",
    "score_transformers",
    "slid_nats",
    "sweep",
    "sweep_table",
    "table",
    "write_report",
]
