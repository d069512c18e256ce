"""Reports of a finished run: pictures, a Markdown page and a self-contained HTML page."""

from .markdown import report_run, write_report
from .pictures import heat_map
from .summary_picture import plot_summary

__all__ = ["heat_map", "plot_summary", "report_run", "write_report"]
