"""The resolved base model: everything that is derived from a checkpoint's files, derived once."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..recipe import Base, is_hub_id
from .checkpoint_files import (
    TOKENIZER,
    UNQUANTISED,
    check_files,
    checkpoint_folder,
    files_digest,
    own_files,
    quantisation_of,
)
from .loading import config_json, is_local, load_config, load_model, load_tokenizer, prefix_of
from .query_layout import QuerySite, query_site
from .rope_config import Layout, RopeFacts, layout_of, rope_facts
from .wrappers import config_object

MOST_TOKENS = 10**9
"""Largest accepted window; a larger one is taken for a mistake."""


@dataclass(frozen=True)
class BaseModel:
    """A base model as a recipe names it; each property is computed when it is first needed, and then kept."""

    source: Base
    """The recipe's `base` section."""

    @classmethod
    def of_config(cls, source: Base, written: dict[str, Any]) -> "BaseModel":
        """A base of which only this config.json is known: it has neither weights nor a tokenizer."""
        made = cls(source)
        vars(made).update(written=written, config=config_object(written))
        return made

    @cached_property
    def is_local(self) -> bool:
        """Whether the config is on this machine; reads no file. Raises `UserError` if there is no such folder."""
        return is_local(self.source.model, self.source.revision)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config as its transformers class holds it.

        Raises:
            UserError: if there is no such model, or its config cannot be loaded.
        """
        return load_config(self.source.model, self.source.revision)

    @property
    def text_config(self) -> PreTrainedConfig:
        """The config of the language model: the nested one where `config` wraps it."""
        return self.config.get_text_config()

    @cached_property
    def written(self) -> dict[str, Any]:
        """config.json as written."""
        return config_json(self.source.model, self.source.revision)

    @cached_property
    def layout(self) -> Layout:
        """The shape of the rotary embeddings, without any rope key."""
        return layout_of(self.written)

    @cached_property
    def facts(self) -> RopeFacts:
        """RoPE facts from the config; raises `UserError` if the model cannot be tuned."""
        try:
            found = rope_facts(self.config)
            table, factor = found.table(found.native)
            possible = 2 <= found.native <= MOST_TOKENS and 0 < found.theta < math.inf and math.isfinite(factor)
            if not (possible and table.isfinite().all() and (table > 0).all()):
                raise ValueError(f"window {found.native}, theta {found.theta}")
        except UserError:
            raise
        except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"base.model: {self.source.model!r}: its config describes no usable RoPE ({str(error)[:200]}); "
                "repair it"
            ) from error
        return found

    @cached_property
    def _site(self) -> QuerySite | str:
        try:
            return query_site(self.written)
        except UserError as error:
            return str(error).removeprefix("folding: ")

    @property
    def query_site(self) -> QuerySite | None:
        """Where the queries can be scaled exactly; None where they cannot."""
        return None if isinstance(self._site, str) else self._site

    @property
    def no_query_site(self) -> str:
        """The reason why `query_site` is None; empty if it is not."""
        return self._site if isinstance(self._site, str) else ""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the checkpoint; raises `UserError` if there is none."""
        folder = Path(self.source.model)
        if folder.is_dir() and not own_files(folder, TOKENIZER):
            raise UserError(f"base.model: {folder} has no tokenizer; copy the files of the model it was made from")
        return load_tokenizer(self.source.model, self.source.revision, self.config)

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that the tokenizer prepends to every text; usually one or none."""
        return prefix_of(self.tokenizer)

    def notes(self) -> list[str]:
        """Describe unusual properties of the checkpoint and their consequences; loads no weights.

        Raises:
            UserError: for a folder that `load` would refuse: other formats than safetensors, missing files, an adapter.
        """
        if not is_hub_id(self.source.model):
            check_files(self.folder())
        found = []
        if method := quantisation_of(self.written):
            found.append(
                f"base.model: the weights are quantised ({method}); nothing can be folded into them: {UNQUANTISED}"
            )
        if self.text_config is not self.config:
            found.append(
                f"base.model: the checkpoint holds more than a language model ({self.config.model_type}); only the "
                "language model is tuned, and all other weights are exported as they are"
            )
        return found

    def files(self, patterns: Sequence[str], but: str | None = None) -> list[Path]:
        """The checkpoint's files that match the patterns, except those that match `but`; downloaded from the hub.

        Raises:
            UserError: if one is a link to a file outside the checkpoint's folder.
        """
        return own_files(self.folder(patterns, but), patterns, but)

    def folder(self, patterns: Sequence[str] = ("README.md", "LICENSE*"), but: str | None = None) -> Path:
        """A folder with the checkpoint's files that match the patterns; they are downloaded from the hub."""
        return checkpoint_folder(self.source.model, self.source.revision, patterns, but)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the config, the weights and the tokenizer's files, on which runs and measurements depend."""
        config = {"config of the base": hashlib.sha256(json.dumps(self.written).encode()).hexdigest()}
        kinds = {"weights": ("*.safetensors",), "tokenizer": TOKENIZER}
        return config | {f"{kind} of the base": files_digest(self.files(names)) for kind, names in kinds.items()}

    @cached_property
    def digest(self) -> str:
        """One SHA-256 of all `digests`."""
        return hashlib.sha256(json.dumps(self.digests).encode()).hexdigest()

    def load(self, dtype: str | None = None) -> PreTrainedModel:
        """Load the model with stock classes, in `dtype` (by default that of the recipe)."""
        return load_model(self.source.model, self.source.revision, dtype or self.source.dtype, self.config)
