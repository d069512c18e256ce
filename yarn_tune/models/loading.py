"""Loading models with stock classes, finding modules in them, and writing their weights."""

import gc
import itertools
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as progress

from ..errors import UserError
from ..files import readable_by_all
from ..recipe import Base, is_hub_id
from .checkpoint_files import READ, SECOND_COPY, check_complete, check_files, checkpoint_folder
from .wrappers import auto_class, wrapper_of
from .written_config import check_loadable, check_rope_types

EXTRA_KEYS = {"attn_factor", "short_mscale", "long_mscale"}
"""Keys of a rope section that an export writes for other serving stacks; transformers warns about them."""

GIB = 2**30
MESSAGE = 500
"""Most characters of another library's message that are shown."""

SIZES = {"num_hidden_layers": 10_000, "hidden_size": 10**6, "vocab_size": 10**8, "max_position_embeddings": 10**9}
"""Largest accepted values of a config; a larger value is a mistake, and building such a model would not end."""


def load_config(model: str, revision: str | None = None, local_only: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint folder or hub id.

    Raises:
        UserError: if there is no such model.
    """
    _check_present(model)
    try:
        config = _from_hub(AutoConfig.from_pretrained, model, revision=revision, local_files_only=local_only)
    except UserError:
        # Config classes report only the first value of a wrong type, and seldom a remedy.
        check_loadable(config_json(model, revision))
        raise
    check_rope_types(config.get_text_config())
    for key, most in SIZES.items():
        value = getattr(config.get_text_config(), key, None)
        if isinstance(value, (int, float)) and not 0 < value <= most:
            raise UserError(f"base.model: {model!r}: {key} is {value} in its config, which is out of range; repair it")
    return config  # type: ignore[no-any-return]


def config_json(model: str, revision: str | None = None) -> dict[str, Any]:
    """A checkpoint's config.json as written, whether or not transformers has a class for it.

    Raises:
        UserError: if there is no such model, or the file is not JSON.
    """
    _check_present(model)
    written = _from_hub(PreTrainedConfig.get_config_dict, model, revision=revision)[0]
    return {key: value for key, value in written.items() if key != "_commit_hash"}


def _check_present(model: str) -> None:
    if not is_hub_id(model) and not (Path(model) / "config.json").is_file():
        raise UserError(f"base.model: {model!r} is neither a checkpoint folder (with config.json) nor a hub id")


def is_local(model: str, revision: str | None = None) -> bool:
    """Whether the config of a checkpoint folder or hub id is on this machine; reads nothing.

    Raises:
        UserError: if there is no such folder.
    """
    if not is_hub_id(model):
        _check_present(model)
        return True
    try:
        return isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)
    except HFValidationError as error:
        raise UserError(f"base.model: {model!r} is neither a checkpoint folder nor a hub id ({error})") from error


@contextmanager
def without_network() -> Iterator[None]:
    """Within the context, hub ids are read from the local cache only.

    Otherwise each load sends requests to the hub to find changed files, and without a network each request times out.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def load_model(
    model: str, revision: str | None = None, dtype: str = "bfloat16", config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """Load a causal language model, or a multimodal one as a whole, in evaluation mode, without a KV cache.

    Only stock classes are used. `inv_freq` stays float32: `from_pretrained(dtype=...)` does not convert it, while a
    later `.to(dtype)` would.

    Args:
        model: a checkpoint folder or hub id.
        revision: the revision of a hub id.
        dtype: name of the torch dtype of the weights.
        config: the config of the model, if it was loaded before; it is copied.

    Raises:
        UserError: if weights are missing, unknown or of another shape, or files are not the checkpoint's own.
    """
    check_files(checkpoint_folder(model, revision, READ, SECOND_COPY))
    config = deepcopy(load_config(model, revision) if config is None else config)
    partial = config.get_text_config() is not config and wrapper_of(config) is None
    for part in (config, config.get_text_config()):
        # A config may name an attention kernel to download; None is the default of transformers.
        part._attn_implementation = None
    loaded, info = _from_hub(
        auto_class(config).from_pretrained,
        model,
        revision=revision,
        dtype=getattr(torch, dtype),
        use_safetensors=True,  # a pickle can hold code
        config=config,
        output_loading_info=True,
    )
    check_complete(model, info, partial)
    loaded.config.use_cache = False
    return loaded.eval()  # type: ignore[no-any-return]


def load_tokenizer(
    model: str, revision: str | None = None, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub id; `config` is the model's, if it was loaded before."""
    known = {} if config is None else {"config": config}
    return _from_hub(AutoTokenizer.from_pretrained, model, revision=revision, **known)  # type: ignore[no-any-return]


LONGEST_RENDERING = 30.0
"""Seconds that a chat template may take."""


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Any, add_generation_prompt: bool = False) -> str:
    """Render messages with the tokenizer's chat template.

    A template is a program that comes with the checkpoint. It runs in a sandbox, which limits single loops but not
    nested ones; in the main thread, where a timer can interrupt it, it is limited to 30 seconds.

    Raises:
        UserError: if the template raises an error or takes too long.
    """
    timed = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes longer than {LONGEST_RENDERING:g} seconds")

    before = signal.signal(signal.SIGALRM, end) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, LONGEST_RENDERING)
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(tokenizer.apply_chat_template(messages, **options))  # type: ignore[arg-type]
    except Exception as error:  # a template can raise any exception
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"the chat template of the tokenizer fails: {reason[:300]}") from error
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


def prefix_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that this tokenizer, and so a server, prepends to a text: none, `<s>`, or `[gMASK]<sop>`."""
    probe = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    added = itertools.takewhile(
        lambda pair: pair[1], zip(probe["input_ids"], probe["special_tokens_mask"], strict=True)
    )
    return tuple(token for token, _ in added)


def slow_dtype(dtype: str, device: str) -> str | None:
    """A warning if a device only emulates this dtype (bfloat16 on x86 without AVX-512), otherwise None."""
    if dtype == "bfloat16" and device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "NO AVX"):
        return (
            "WARNING: this CPU has no instructions for bfloat16, so that matrix products take up to a hundred times "
            "longer than in float32; set base.dtype: float32"
        )
    return None


def to_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move the model to the accelerator if there is one with enough free memory; otherwise print why not to stderr."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return model
    # A float32 model takes twice its memory in training. Reserve a tenth more, and 1 GiB, for activations.
    need, free = 1.1 * model.get_memory_footprint() + GIB, _free(accelerator)
    if need > free:
        print(
            f"yarn-tune: the model in {str(model.dtype).removeprefix('torch.')} needs about {need / GIB:.1f} GiB, and "
            f"{free / GIB:.1f} are free on {accelerator.type}: it stays on the CPU, which is slower",
            file=sys.stderr,
        )
        return model
    model.to(accelerator)  # type: ignore[arg-type]
    return model


def _free(accelerator: torch.device) -> float:
    """Free bytes on the device; infinity if the number is not known."""
    if accelerator.type != "cuda":
        return math.inf
    # Release the memory of earlier models first, so that it counts as free.
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def save_weights(weights: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """Write a weight file of a checkpoint.

    Raises:
        UserError: if it cannot be written, as on a full disk.
    """
    try:
        save_file(weights, path, metadata=metadata)
        readable_by_all(path)  # safetensors creates it readable by its owner only
    except (SafetensorError, OSError) as error:
        reason = re.sub(r"^.*I/O error: |\(os error.*", "", str(error)).strip()
        raise UserError(f"{path} cannot be written ({reason}); make room and run the same command again") from error


def base_identity(base: Base) -> tuple[str, str | None]:
    """The identity of a base: its hub id, or the real path of its folder, and its revision."""
    return os.path.realpath(base.model) if Path(base.model).is_dir() else base.model, base.revision


def _from_hub(load: Callable[..., Any], model: str, **options: Any) -> Any:
    """Call a `from_pretrained` and convert its errors to `UserError`."""
    try:
        with _quiet(model):
            # A checkpoint's own code is never run: what is exported must run on stock classes.
            return load(model, trust_remote_code=False, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # config classes raise any exception for a damaged config
        reason = " ".join(str(error).split())[:MESSAGE] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it requires custom code, which yarn-tune never runs; only classes of transformers are supported"
        elif is_hub_id(model) and re.search("couldn't connect|offline mode", str(error)):
            reason = (
                "the hub is not reached, and the local cache does not hold it; where there is a network, run "
                f"`hf download {model}`, and use the same cache (HF_HOME) or name the folder"
            )
        raise UserError(f"base.model: {model!r} could not be loaded: {reason}") from error


@contextmanager
def _quiet(model: str) -> Iterator[None]:
    """Hide the progress bar of a local load, warnings about `EXTRA_KEYS`, and the hub's notes about retries."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    bar = progress.is_progress_bar_enabled() and not is_hub_id(model)
    shown = logging.getLogger("transformers").handlers
    for handler in shown:
        handler.addFilter(_is_news)
    if bar:
        progress.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(level)
        if bar:
            progress.enable_progress_bar()
        for handler in shown:
            handler.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a warning is about more than keys that an export writes for other serving stacks."""
    text = record.getMessage()
    named = set(re.findall(r"'(\w+)'", text.rpartition(": ")[2]))
    return not ("nrecognized keys" in text and named and named <= EXTRA_KEYS)
