"""Per-token NLL measured once and kept on disk, so that a comparison that was interrupted continues where it was.

Shapes: a document is `[T]` token ids; its NLL is float32 `[T - 1]`, entry i for predicting token i + 1.
"""

import hashlib
import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserError
from ..files import read_tensors_and_metadata, save_tensors, write_atomically
from ..models import BaseModel, to_device
from .methods import Method
from .perplexity import full_nll, slid_nll


class NllCache:
    """Measures one base model; the weights are loaded for the first measurement that is not on disk.

    A measurement's key is a hash of the checkpoint's config and weights, the dtype, `chunk`, the method's numbers and
    the tokens. A measurement whose checksum does not match its content is made again.

    Args:
        base: the model to measure.
        folder: folder of the measurements, one file each.
        chunk: tokens per forward pass over a KV cache; None: the whole document.
    """

    def __init__(self, base: BaseModel, folder: Path, chunk: int | None = None) -> None:
        self.base, self.folder, self.chunk = base, folder, chunk
        self._model: PreTrainedModel | None = None

    @cached_property
    def base_key(self) -> list[object]:
        """The part of a measurement's key that identifies the checkpoint, its dtype and `chunk`."""
        digests = [self.base.digests[name] for name in ("config of the base", "weights of the base")]
        return [*digests, self.base.source.dtype, self.chunk]

    @property
    def model(self) -> PreTrainedModel:
        """The base with its stock rotary module, on the accelerator if there is one."""
        if self._model is None:
            self._model = to_device(self.base.load())
        return self._model

    def full(self, method: Method, document: Tensor) -> tuple[Tensor, float]:
        """NLL under a method with full attention, and the seconds the measurement took."""
        read = len(document) - 1  # the last token is only predicted

        def measure() -> Tensor:
            with method.on(self.model, read):
                return full_nll(self.model, document, self.chunk)

        return self._kept(method.key(read), document, measure)

    def slid(self, document: Tensor, window: int, stride: int, method: Method | None = None) -> tuple[Tensor, float]:
        """NLL with a window slid over the document, of the base or under a method, and the seconds it took."""
        how = window, stride, self.base.prefix

        def measure() -> Tensor:
            if method is None:
                return slid_nll(self.model, document, *how)
            with method.on(self.model, window):
                return slid_nll(self.model, document, *how)

        return self._kept(["slid", *how, *([] if method is None else method.key(window))], document, measure)

    def stock(self, document: Tensor) -> tuple[Tensor, float]:
        """NLL of a local checkpoint as its own config defines it, and the seconds the measurement took."""
        return self._kept(["stock"], document, lambda: full_nll(self.model, document, self.chunk))

    def _kept(self, what: object, document: Tensor, measure: Callable[[], Tensor]) -> tuple[Tensor, float]:
        key = json.dumps([self.base_key, what, document.tolist()])
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        try:
            tensors, metadata = read_tensors_and_metadata(path, key, required=True)
            return tensors["nll"], float(metadata["seconds"])
        except (UserError, KeyError, ValueError):
            started = time.monotonic()
            nll = measure().float().contiguous()
            seconds = round(time.monotonic() - started, 3)
            write_atomically(path, save_tensors({"nll": nll}, {"seconds": str(seconds)}, key))
            return nll, seconds
