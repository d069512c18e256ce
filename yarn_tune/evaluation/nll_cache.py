"""Per-token NLL measured once and kept on disk, so that a comparison that was interrupted continues where it was.

Shapes: a document is `[T]` token ids; its NLL is float32 `[T - 1]`, entry i for predicting token i + 1.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserError
from ..files import read_tensors_and_metadata, save_tensors, write_atomically
from ..models import BaseModel, cache_folder, to_device
from ..version import __version__
from .methods import Method
from .perplexity import full_nll, slid_nll


class NllCache:
    """Measures one base model; the weights are loaded for the first measurement that is not on disk.

    A measurement's key is a hash of the checkpoint's config and weights, the dtype, `chunk`, the method's numbers and
    the tokens. A measurement whose checksum does not match its content is made again.

    Measurements that do not depend on a run (`shared`) are kept in the user's cache, where every run on the same base
    and documents finds them; in `folder` if the cache cannot be written.

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

    def full(self, method: Method, document: Tensor, shared: bool = False) -> tuple[Tensor, float]:
        """NLL under a method with full attention, and the seconds the measurement took."""
        read = len(document) - 1  # the last token is only predicted

        def measure() -> Tensor:
            with method.on(self.model, read):
                return full_nll(self.model, document, self.chunk)

        return self._kept(method.key(read), document, measure, shared)

    def slid(self, document: Tensor, window: int, stride: int, method: Method | None = None) -> tuple[Tensor, float]:
        """NLL with a window slid over the document, of the base (shared) or under a method, and the seconds it took."""
        how = window, stride, self.base.prefix

        def measure() -> Tensor:
            if method is None:
                return slid_nll(self.model, document, *how)
            with method.on(self.model, window):
                return slid_nll(self.model, document, *how)

        what = ["slid", *how, *([] if method is None else method.key(window))]
        return self._kept(what, document, measure, shared=method is None)

    def stock(self, document: Tensor) -> tuple[Tensor, float]:
        """NLL of a local checkpoint as its own config defines it, and the seconds the measurement took."""
        return self._kept(["stock"], document, lambda: full_nll(self.model, document, self.chunk))

    def _kept(
        self, what: object, document: Tensor, measure: Callable[[], Tensor], shared: bool = False
    ) -> tuple[Tensor, float]:
        key = json.dumps([self.base_key, what, document.tolist()])
        paths = [self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"]
        if shared:
            paths.insert(0, shared_path("nll", key, "safetensors"))
        for path in paths:
            try:
                tensors, metadata = read_tensors_and_metadata(path, key, required=True)
                return tensors["nll"], float(metadata["seconds"])
            except (UserError, KeyError, ValueError):
                continue
        started = time.monotonic()
        nll = measure().float().contiguous()
        seconds = round(time.monotonic() - started, 3)
        write_to_first(paths, save_tensors({"nll": nll}, {"seconds": str(seconds)}, key))
        return nll, seconds


SHARED_FORMAT = 1
"""Number in the keys of shared measurements; raise it when the code computes other numbers from the same inputs."""


def shared_path(kind: str, key: str, ending: str) -> Path:
    """The file in the user's cache of a measurement that does not depend on a run.

    Its name is a hash of the measurement's key, and of what its digits depend on: releases and the kind of device.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    facts = [SHARED_FORMAT, __version__, torch.__version__, transformers.__version__, device and device.type, key]
    return cache_folder() / kind / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.{ending}"


def write_to_first(paths: list[Path], content: bytes) -> None:
    """Write into the first of these files that can be written; raises `UserError` if none can."""
    for path in paths[:-1]:
        with contextlib.suppress(UserError):
            write_atomically(path, content)
            return
    write_atomically(paths[-1], content)
