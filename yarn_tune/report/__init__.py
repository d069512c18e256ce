"""Reports of a finished run: pictures and a Markdown page."""

from .markdown import write_report
from .pictures import heat_map

__all__ = ["heat_map", "write_report"]
