"""Collection of the warnings that transformers logs about rope sections, where other libraries raise errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def rope_warnings() -> Iterator[list[str]]:
    """Collect the warnings of transformers that mention rope; the list grows inside the context."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "rope" in record.getMessage().lower():
                texts.append(record.getMessage())

    # Configuration and modeling modules both check rope sections; all of them log below this logger.
    logger, collector = logging.getLogger("transformers"), Collector(level=logging.WARNING)
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    try:
        yield texts
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
