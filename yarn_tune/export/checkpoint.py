"""From a finished run to an ordinary Hugging Face checkpoint, reloaded and compared before it gets its name.

The base's weight files are copied byte for byte, unless a stack asked for needs the temperature folded into the
queries; otherwise only config.json and the tokenizer's window change. The checkpoint is written under another name,
reloaded with stock classes, compared with the tuned model in memory below, at and above the native window, and only
then renamed: a mismatch leaves nothing behind.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import UserError
from ..files import put_in_place, write_json
from ..recipe import Recipe, is_hub_id
from ..runs import Run, learned_of
from ..serving import RopeEncoding, Target, choose_encoding
from ..tunable import KINDS, Folded, Learned, fold_checkpoint, merge_checkpoint
from .fidelity import compare_with_memory
from .serving_page import serving_page

COPIED = (
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
CARD = "README.md"
"""The base's, for its licence."""
OVERRIDABLE = ("vllm", "vllm-0.29")


def export(run: Run, overrides_only: bool = False) -> Path:
    """Write the checkpoint (or only its overrides) of a finished run; returns what was written.

    Raises:
        UserError: if no config serves what was learned on all stacks asked for.
        CheckFailed: if the reloaded checkpoint does not compute what was learned.
    """
    learned = learned_of(run)
    aim = Target.of_model(run.base, run.recipe.export)
    if overrides_only:
        # Overrides are a thing of vLLM alone, so the other stacks need not be able to carry them.
        vllm = tuple(name for name in aim.stacks if name.startswith("vllm")) or OVERRIDABLE
        for kind in [*(fold.kind for fold in learned.folds), *(["lora"] if learned.lora else [])]:
            raise UserError(f"{KINDS[kind].key}: {KINDS[kind].label} are in the weights, so overrides of the base's "
                            "config cannot carry them; export a checkpoint")  # fmt: skip
        path = run.folder / "overrides.json"
        write_json(path, choose_encoding(learned, replace(aim, stacks=vllm, fold="never")).overrides(aim.base))
        return path
    served = choose_encoding(learned, aim)
    target = run.folder / "export"
    partial = run.folder / ".export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        folded = write_checkpoint(run.recipe, learned, served, aim, partial)
        fidelity = compare_with_memory(run, learned, served, partial)
        fidelity |= {"fold": asdict(folded)} if folded else {}
        write_json(partial / "fidelity.json", fidelity)
        page = serving_page(run.recipe.base.model, learned, served, aim, folded, fidelity)
        (partial / "SERVING.md").write_text(page, encoding="utf-8")
        put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def write_checkpoint(
    recipe: Recipe, learned: Learned, served: RopeEncoding, aim: Target, folder: Path
) -> Folded | None:
    """Copy the base, put the learned rope section into its config, and fold what the config does not carry."""
    base = base_folder(recipe)
    for pattern in COPIED:
        for source in sorted(base.glob(pattern)):
            if not source.name.startswith("consolidated"):  # Mistral's second copy of the weights
                shutil.copyfile(source, folder / source.name)
    config = served.config(aim.base)
    # Code of the base's own is not copied, so nothing may ask for it.
    write_json(folder / "config.json", {key: value for key, value in config.items() if key != "auto_map"})
    folds = served.folds(learned)
    if learned.lora is not None:
        merge_checkpoint(folder, learned.lora)
    elif not folds:
        write_json(folder / "overrides.json", served.overrides(aim.base))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        tokenizer = json.loads(settings.read_text(encoding="utf-8"))
        write_json(settings, tokenizer | {"model_max_length": served.max_position_embeddings})
    return fold_checkpoint(folder, aim.base, served.fold, learned.folds) if folds else None


def base_folder(recipe: Recipe) -> Path:
    """The base checkpoint's files on disk."""
    if is_hub_id(recipe.base.model):
        wanted = ["config.json", CARD, *COPIED]
        second = ["consolidated*"]  # copy of Mistral's weights
        return Path(snapshot_download(
            recipe.base.model, revision=recipe.base.revision, allow_patterns=wanted, ignore_patterns=second
        ))  # fmt: skip
    return Path(recipe.base.model)
