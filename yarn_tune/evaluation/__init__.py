"""Perplexity, retrieval, and the comparison of methods with its verdict."""

from .comparison import compare, named_rows
from .factor_sweep import check_factors, sweep, sweep_table
from .methods import Method, search_free_methods, servable
from .native_adapted import has_control, learn_native_adapted
from .nll_cache import NllCache
from .perplexity import NllSum, bucket_edges, by_position, full_nll, slid_nll
from .results import COMPARED, CompareRow, Comparison, TextResult, table, tables
from .retrieval import (
    Retrieval,
    RetrievalGrid,
    answer_logits,
    greedy_answer,
    load_records,
    retrieval_table,
    retrieve,
    save_records,
    score_server,
    score_transformers,
)
from .verdict import Verdict

__all__ = [
    "COMPARED",
    "CompareRow",
    "Comparison",
    "Method",
    "NllCache",
    "NllSum",
    "Retrieval",
    "RetrievalGrid",
    "TextResult",
    "Verdict",
    "answer_logits",
    "bucket_edges",
    "by_position",
    "check_factors",
    "compare",
    "full_nll",
    "greedy_answer",
    "has_control",
    "learn_native_adapted",
    "load_records",
    "named_rows",
    "retrieval_table",
    "retrieve",
    "save_records",
    "score_server",
    "score_transformers",
    "search_free_methods",
    "servable",
    "slid_nll",
    "sweep",
    "sweep_table",
    "table",
    "tables",
]
