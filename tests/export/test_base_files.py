"""What an export keeps of the base's folder beside the weights, and what it leaves out without failing."""

import json
import os

import pytest
from tiny import finished_run, save_tiny
from yarn_tune.export import export, prepare_upload
from yarn_tune.serving import verify

KEPT = (
    "original/tokenizer.model", "original/params.json", "additional_chat_templates/rag.jinja", "assets/curve.png",
    "assets/deep/er/note.md", "LICENSES/Apache-2.0", "NOTICE", "USE_POLICY.md", "vocab.json",
)  # fmt: skip
LEFT = (
    "original/consolidated.00.pth", "onnx/model.onnx", "onnx/decoder.safetensors", "runs/events.bin", "figures/draw.py",
    "LICENSES/install.sh", "tokenizer_of_mine.py", ".git/config.json", ".cache/hub/note.txt", "assets/.hidden.md",
    "other/model.safetensors.index.json", "consolidated.safetensors", "training_args.bin", "modeling_odd.py",
    "README.md/inside.txt", "fidelity.json/inside.txt",
)  # fmt: skip


@pytest.fixture
def base(tmp_path):
    folder = save_tiny(tmp_path / "base")
    for name in (*KEPT, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}")
    return folder


def test_sub_folders_are_kept_but_for_weights_and_code(base, tmp_path):
    made = export(finished_run(tmp_path, "scale", base=base))
    for name in KEPT:
        assert (made / name).read_text() == f"the text of {name}"
    assert not [name for name in LEFT if (made / name).is_file()]
    listed = json.loads((made / "checksums.json").read_text())["files"]
    assert set(KEPT) <= set(listed)
    assert verify(str(made)).passed
    assert set(KEPT) <= set(prepare_upload(made, "lab/long", "org/base").files)
    (made / "original" / "tokenizer.model").write_text("another")
    assert not verify(str(made)).passed


def test_nothing_in_the_folder_stops_an_export(base, tmp_path, capsys):
    run = finished_run(tmp_path, "scale", base=base)
    secret = tmp_path / "secret.md"
    secret.write_text("not for the hub")
    (base / "assets" / "link.md").symlink_to(secret)
    (base / "assets" / "gone.md").symlink_to(base / "nowhere")
    (base / "assets" / "loop").symlink_to(base)
    (base / "LICENSE.folder").mkdir()
    os.mkfifo(base / "LICENSE-pipe")
    (base / "generation_config.json").write_text("[1, 2")
    made = export(run)
    told = capsys.readouterr().err
    assert f"link.md is left out of the export: it is a link to {secret}, outside of the base's folder" in told
    assert "gone.md is left out of the export: it is no regular file" in told
    assert "LICENSE-pipe is left out of the export: it is no regular file" in told
    assert "generation_config.json cannot be read" in told
    assert not any(
        (made / name).exists() for name in ("assets/link.md", "assets/gone.md", "assets/loop", "LICENSE-pipe")
    )
    assert not (made / "generation_config.json").exists()
    assert (made / "NOTICE").is_file()
