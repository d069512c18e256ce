"""Perplexity, retrieval, the comparison of methods, and its report."""

from .comparison import compare, named_rows
from .factor_sweep import check_factors, sweep, sweep_table
from .perplexity import NllSum, bucket_edges, by_position, full_nats, slid_nats
from .report import write_report
from .results import Comparison, as_json, of_json, table
from .retrieval import heat_map, retrieval_table, retrieve, score_server, score_transformers

__all__ = [
    "Comparison",
    "NllSum",
    "as_json",
    "bucket_edges",
    "by_position",
    "check_factors",
    "compare",
    "full_nats",
    "heat_map",
    "named_rows",
    "of_json",
    "retrieval_table",
    "retrieve",
    "score_server",
    "score_transformers",
    "slid_nats",
    "sweep",
    "sweep_table",
    "table",
    "write_report",
]
