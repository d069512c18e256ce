"""Loading prints nothing about a checkpoint that is fine, and still shows warnings that matter."""

import json
import logging

import pytest
from tiny import NATIVE, save_tiny
from yarn_tune.models import EXTRA_KEYS, load_model

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": NATIVE,
    "long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "attention_factor": 1.1,
}  # fmt: skip


def warnings_of(folder, extra) -> list[str]:
    """What transformers shows about keys when a checkpoint with this rope section is loaded."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_parameters": LONGROPE | extra, "max_position_embeddings": 4 * NATIVE}))
    shown: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Handler(level=logging.WARNING)
    logger.addHandler(handler)
    try:
        load_model(str(folder))
    finally:
        logger.removeHandler(handler)
    return [text for text in shown if "nrecognized keys" in text]


@pytest.mark.rope_warnings
def test_keys_for_other_stacks_cause_no_warning_and_others_do(tmp_path, capfd):
    save_tiny(tmp_path)
    capfd.readouterr()
    assert warnings_of(tmp_path, {key: 1.1 for key in EXTRA_KEYS}) == []
    assert "Loading weights" not in capfd.readouterr().err
    assert "'colour'" in warnings_of(tmp_path, {"short_mscale": 1.1, "colour": 2})[0]
