"""The tuner of YARN_TUNE adapters: it inserts the layer into a model, removes it, and merges it.

Importing this module registers the type with PEFT; then `get_peft_model`, `PeftModel.from_pretrained`,
`model.load_adapter` and `AutoModelForCausalLM.from_pretrained(adapter)` accept it.

`merge_and_unload` returns what `export` writes: a stock model with the config that serves the numbers, and with gains
folded into its weights. LoRA beside it is a second adapter, of PEFT's own type.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn

from ..errors import UserError
from ..models import rope_facts, rotary_site
from ..recipe import is_hub_id
from ..serving import RopeEncoding, Target, choose_encoding, representable_parameters
from ..tunable import Learned, config_changes, fold_parameters, set_parameters
from .config import YarnTuneConfig
from .layer import YarnTuneLayer, place_of

__all__ = ["YarnTuneConfig", "YarnTuneLayer", "YarnTuneModel"]


class YarnTuneModel(BaseTuner):
    """The PEFT tuner that replaces the rotary module by the layer, and restores it."""

    prefix = "yarn_tune_"
    tuner_layer_cls = YarnTuneLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # `_prepare_model`, which gets the model, fills it in

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        peft_config.start(rope_facts(model.config))
        peft_config.target_modules = [place_of(model)]
        if text := other_revision(peft_config, model.config):
            warnings.warn(text, UserWarning, stacklevel=2)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in (peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, YarnTuneLayer) else YarnTuneLayer(target, self.model)
        layer.add(adapter_name, peft_config.start(rope_facts(self.model.config)), peft_config)
        setattr(parent, target_name, layer)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the stock model that `export` would write: config, rotary module and, where folded, weights.

        LoRA beside it is merged first.

        Raises:
            UserError: if not exactly one adapter of this type is to be merged, or no config serves its numbers.
        """
        layer = self._layer()
        own = [name for name in adapter_names or self.active_adapters if name in layer.rotaries]
        if len(own) != 1:
            raise UserError(f"merge_and_unload: name one of {', '.join(layer.rotaries)}; found {own}")
        config: Any = self.peft_config[own[0]]
        if config.as_llama:
            raise UserError(
                "merge_and_unload: this adapter is to be written as a Llama (as_llama), and merging does not change "
                "the class of a loaded model; run `yarn-tune export` on the adapter"
            )
        target = Target.of(self.model.config.to_dict(), config.stacks, config.fold, config.qk_bias)
        learned = representable_parameters(layer.rotary(own[0]), target)
        served = choose_encoding(learned, target)
        self._take_out()
        super().merge_and_unload(progressbar, safe_merge, adapter_names)
        make_served(self.model, learned, served)
        return self.model  # type: ignore[no-any-return]

    def unload(self) -> nn.Module:
        """Return the base model without the adapter."""
        self._take_out()
        return super().unload()

    def _layer(self) -> YarnTuneLayer:
        return next(module for module in self.model.modules() if isinstance(module, YarnTuneLayer))

    def _take_out(self) -> None:
        layer = self._layer()
        parent, _, name = place_of(self.model).rpartition(".")
        setattr(self.model.get_submodule(parent), name, layer.base_layer)
        layer.release()


def other_revision(config: YarnTuneConfig, loaded: Any) -> str:
    """A warning if a base was or may have been loaded in another revision than an adapter records; empty if not.

    transformers loads the base of an adapter in its newest revision, whatever the adapter's config says, and recent
    releases do not keep the commit of a model. Then the warning says under which condition it applies.

    Args:
        config: the adapter's config.
        loaded: the config of the loaded base.
    """
    name, wanted = getattr(loaded, "_name_or_path", ""), config.revision
    if not wanted or not is_hub_id(name):
        return ""
    commit, recorded = getattr(loaded, "_commit_hash", None), _commit(name, wanted)
    if recorded == (commit or _commit(name, "main")):
        return ""
    how = f"was loaded in revision {commit}" if commit else "may have been loaded in another one"
    return (
        f"the numbers of this adapter were learned on revision {wanted} of {config.base_model_name_or_path}, and the "
        f'base {how}, whose weights may differ: load it with from_pretrained("{name}", revision="{wanted}"), and then '
        "the adapter onto it"
    )


def _commit(model: str, revision: str) -> str:
    """The commit of a revision by the local hub cache; the revision itself if it is not there."""
    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else revision


@torch.no_grad()
def make_served(model: Any, learned: Learned, served: RopeEncoding) -> None:
    """Change a stock model to what its export would load as: the written config and the folded weights."""
    base, text = model.config.to_dict(), model.config.get_text_config()
    if served.folds(learned):
        set_parameters(model, fold_parameters(model, base, served.fold, learned.folds))
    changed = type(model.config).from_dict(served.config(base | config_changes(learned.folds)))
    before = text.to_dict()
    for key, value in changed.get_text_config().to_dict().items():
        if before.get(key) != value:
            setattr(text, key, value)
    parent, name = rotary_site(model)
    stock = getattr(parent, name)
    setattr(parent, name, type(stock)(text).to(next(stock.buffers()).device))


register_peft_method(name="yarn_tune", config_cls=YarnTuneConfig, model_cls=YarnTuneModel, prefix="yarn_tune_")
