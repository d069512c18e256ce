"""Per-token nats of any RoPE table on any document, kept on disk: nothing is measured twice, a killed run goes on.

Shapes: a document is `[T]` token ids; its nats are float32 `[T - 1]`, entry i for predicting token i + 1.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from ..files import write_atomically
from ..models import load_model, to_device
from ..recipe import Base
from ..tunable import Factors, Learned, attach_fixed, detach, with_lora
from .perplexity import full_nats, slid_nats

TableOf = Callable[[int], tuple[Tensor, float]]
"""Length read -> (inverse frequencies `[d/2]`, attention factor)."""


@dataclass(frozen=True)
class Method:
    """One way to rotate queries and keys, and to scale queries."""

    table_of: TableOf
    gains: Tensor | None = None
    """`[tuned layers, groups, d/2]`; see `gains.py`."""
    lora: Factors | None = None
    """Changes of the weights."""
    by_length: bool = False
    """Whether the table depends on the length read."""

    @classmethod
    def fixed(cls, inv_freq: Tensor, attention_factor: float = 1.0) -> "Method":
        """The same table at every length."""
        return cls(lambda length: (inv_freq, attention_factor))

    @classmethod
    def of(cls, learned: Learned) -> "Method":
        """Learned numbers."""
        table = (learned.inv_freq(), learned.attention_factor)
        return cls(lambda length: table, learned.gains, learned.lora)

    @contextmanager
    def on(self, model: PreTrainedModel, length: int | None = None) -> Iterator[None]:
        """For a while, the model computes this; at every length as at `length`, if one is given."""
        table = None if length is None else self.table_of(length)
        with with_lora(model, self.lora):
            attach_fixed(model, self.table_of if table is None else lambda read: table, self.gains)
            try:
                yield
            finally:
                detach(model)

    def facts(self, length: int) -> list[object]:
        """What it computes at a length, for a key on disk."""
        inv_freq, factor = self.table_of(length)
        gains = [] if self.gains is None else [_digest(self.gains)]
        lora = [[name, *map(_digest, pair)] for name, pair in (self.lora or {}).items()]
        return [inv_freq.tolist(), factor, *gains, *lora]


def _digest(tensor: Tensor) -> str:
    """Of its shape, type and bytes."""
    stored = tensor.detach().cpu().contiguous()
    facts = f"{stored.dtype} {list(stored.shape)}".encode()
    return hashlib.sha256(facts + stored.numpy().tobytes()).hexdigest()


class NllCache:
    """Measures one base model; the model is loaded when the first measurement is not on disk."""

    def __init__(self, base: Base, folder: Path, chunk: int | None = None, prefix: tuple[int, ...] = ()) -> None:
        self.base, self.folder, self.chunk, self.prefix = base, folder, chunk, prefix
        self._model: PreTrainedModel | None = None
        weights = sorted(Path(base.model).glob("*.safetensors"))
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime) for path in weights]
        self.base_key: list[object] = [base.model, base.revision, base.dtype, stats]
        """What is measured, for a key on disk."""

    @property
    def model(self) -> PreTrainedModel:
        """The base, with its stock rotary module."""
        if self._model is None:
            self._model = to_device(load_model(self.base.model, self.base.revision, self.base.dtype))
        return self._model

    def tabled(self, method: Method, document: Tensor) -> tuple[Tensor, float]:
        """Nats with every token seen by all after it, and the seconds that took (once)."""
        read = len(document) - 1  # the last token is only predicted

        def measure() -> Tensor:
            with method.on(self.model, read):
                return full_nats(self.model, document, self.chunk)

        return self._known(method.facts(read), document, measure)

    def slid(self, document: Tensor, window: int, stride: int) -> tuple[Tensor, float]:
        """Nats of the base with a window slid over the document."""
        how = window, stride, self.prefix
        return self._known(["slid", *how], document, lambda: slid_nats(self.model, document, *how))

    def stock(self, document: Tensor) -> tuple[Tensor, float]:
        """Nats of the checkpoint as its own config has it."""
        config = (Path(self.base.model) / "config.json").read_text(encoding="utf-8")
        return self._known(["stock", config], document, lambda: full_nats(self.model, document, self.chunk))

    def _known(self, what: object, document: Tensor, measure: Callable[[], Tensor]) -> tuple[Tensor, float]:
        facts = json.dumps([self.base_key, what, document.tolist()])
        path = self.folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:24]}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor("nats"), float(file.metadata()["seconds"])
        except (OSError, SafetensorError, KeyError, TypeError):
            begun = time.monotonic()
            nats = measure().float().contiguous()
            seconds = round(time.monotonic() - begun, 3)
            write_atomically(path, save({"nats": nats}, metadata={"seconds": str(seconds)}))
            return nats, seconds
