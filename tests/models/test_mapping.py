"""Every model type of the installed transformers that generates text: it works, or is refused for a true reason."""

import inspect
import re
import sys

import pytest
from tiny import FAMILY_SIZES, THETA_ONLY, tiny_config
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from wrapped import SIZES, THETA_ONLY_SIZES
from yarn_tune.errors import UserError
from yarn_tune.models.families import FAMILIES
from yarn_tune.models.rope_config import layout_of, refusal, rope_facts
from yarn_tune.models.wrappers import text_section

TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} & {*CONFIG_MAPPING})
UNEVEN = ("blt",)
"""Without one size of heads."""


def config_of(kind: str) -> PreTrainedConfig:
    if kind in FAMILY_SIZES:
        return tiny_config(kind)
    try:
        return CONFIG_MAPPING[kind]()
    except ValueError as error:  # composite configs that need their parts
        pytest.skip(f"no default config: {error}")
    except Exception as error:
        pytest.skip(f"no default config: {type(error).__name__}")


def has_rotary_code(config: PreTrainedConfig) -> bool:
    """Whether the modeling file beside the config class mentions RoPE."""
    module = type(config).__module__.replace("configuration_", "modeling_")
    try:
        __import__(module)
    except ImportError:
        return False
    return bool(re.search(r"rotary|apply_rope", inspect.getsource(sys.modules[module]), re.I))


@pytest.mark.rope_warnings
@pytest.mark.parametrize("kind", TYPES)
def test_it_works_or_is_refused_for_a_true_reason(kind):
    config = config_of(kind)
    try:
        text = config.get_text_config()
    except ValueError:  # several text models
        text = config
    reason = refusal(config)
    if reason is None:
        assert kind in FAMILY_SIZES | THETA_ONLY | SIZES | THETA_ONLY_SIZES, "supported families are tested"
        assert rope_facts(config).dim > 0
        return
    assert reason
    assert "not supported" not in reason
    with pytest.raises(UserError, match=re.escape(reason)):
        rope_facts(config)
    if "has no rotary" in reason or "not RoPE" in reason or "no positions" in reason:
        assert not getattr(text, "rope_parameters", None) or "layers have no positions" in reason
        relative = text.model_type == "inkling2_text"  # whose file has rotary code for images
        assert not has_rotary_code(text) or "layers have no positions" in reason or relative
    if "multimodal" in reason and "alone" not in reason:
        assert text is not config


@pytest.mark.rope_warnings
@pytest.mark.parametrize("kind", TYPES)
def test_the_layout_behind_a_wrapped_config_is_found(kind):
    """A nested text config with RoPE is read as one; no wrapper gets the message that it has no RoPE."""
    config = config_of(kind)
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:
        pytest.skip("several text models")
    written = config.to_dict()
    if config.is_encoder_decoder:
        pytest.skip("encoder and decoder")
    if kind in UNEVEN:
        with pytest.raises(UserError, match="has no head size"):
            layout_of(written)
        return
    if not getattr(text, "rope_parameters", None):
        with pytest.raises(UserError, match="has no rotary position embeddings"):
            layout_of(written)
        return
    assert text_section(written)["model_type"] == text.model_type
    layout = layout_of(written)
    assert layout.model_type == text.model_type
    assert layout.head_dim > 0


def test_rows_name_model_types_that_exist():
    for kind, row in FAMILIES.items():
        assert row.model_type == kind
        assert kind in CONFIG_MAPPING, kind
        assert (row.alone and not row.refused) == (kind in FAMILY_SIZES | THETA_ONLY), kind
