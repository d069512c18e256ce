"""Fixtures and hooks; rope warnings of transformers are failures."""

import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported; otherwise it retries for 20 seconds
import pytest
import transformers
from yarn_tune.models.families import FAMILIES
from yarn_tune.models.wrappers import RELEASE

if find_spec("deepspeed"):
    import deepspeed  # noqa: F401  (it logs to the stdout there is when it is imported, which must not be a test's)
from tiny import ENGINES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What this transformers has another way, and what is refused for it."""
    refused = {"nemotron": "one rotary module a layer"} if RELEASE < (5, 1) else {}
    refused |= {family: "refused" for family, row in FAMILIES.items() if row.since > RELEASE}
    for item in items:
        for family, reason in refused.items():
            if family in item.name:
                item.add_marker(pytest.mark.skip(reason=f"transformers {transformers.__version__}, {family}: {reason}"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all tests, in place of the user's; of the session, so that module fixtures use it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YARN_TUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[bool]:
    """Later tests of this process start in the same folder, whatever a test leaves behind."""
    folder = os.getcwd()
    try:
        return (yield)
    finally:
        os.chdir(folder)


@pytest.fixture(autouse=True)
def _rope_warnings_fail(request: pytest.FixtureRequest):
    """transformers warns where it should raise; a rope warning nobody expects fails the test.

    Mark a test `rope_warnings` where the warning is the point.
    """
    seen: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            deliberate = any(key in text for key in ("{'attn_factor'}", "'short_mscale'", "'long_mscale'"))
            if "rope" in text.lower() and not deliberate:
                seen.append(text)

    logger, collector = logging.getLogger("transformers"), Collector(level=logging.WARNING)
    logger.addHandler(collector)
    yield
    logger.removeHandler(collector)
    if not request.node.get_closest_marker("rope_warnings"):
        assert not seen


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM; without one the tests are skipped, but never where `.engines` exists."""
    python = ENGINES / "vllm" / "bin" / "python"
    if not ENGINES.is_dir():
        pytest.skip("no engines here; tests/engines/install.sh installs them")
    assert python.exists(), f"{ENGINES} has no vLLM; run tests/engines/install.sh again"
    return str(python)


@pytest.fixture(scope="session")
def old_vllm_path() -> str:
    """PYTHONPATH with vLLM 0.28."""
    path = ENGINES / "vllm-0.28.0"
    assert path.exists(), f"{ENGINES} has no vLLM 0.28; run tests/engines/install.sh again"
    return str(path)
