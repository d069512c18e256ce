"""A wrong path is described, with the command that takes it; a missing tool or network ends in one message."""

import sys
from pathlib import Path

import pytest
import yaml
from tiny import finished_run, save_tiny
from yarn_tune.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One of each: a run, an adapter, a checkpoint without tokenizer, a GGUF, documents."""
    root = tmp_path_factory.mktemp("things")
    run = finished_run(root, base=save_tiny(root / "base"))
    (run.folder / "adapter").mkdir()
    (run.folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_tiny(root / "bare")
    for path in (root / "bare").glob("tokenizer*"):
        path.unlink()
    (root / "m.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (root / "docs").mkdir()
    (root / "docs" / "a.txt").write_text("w1 w2 w3")
    return root


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("verify run", "it is a run folder"),
        ("eval run docs/a.txt --length 8", "`yarn-tune export run` writes one"),
        (
            "verify run/adapter",
            "an adapter of org/base; `yarn-tune export run/adapter` writes a checkpoint of it",
        ),
        ("train run/adapter", "it is an adapter of org/base"),
        ("verify m.gguf", "it is a GGUF file, which only llama.cpp reads"),
        ("train m.gguf", "it is a GGUF file, which only llama.cpp reads"),
        ("push m.gguf a/b", "it is a GGUF file, which only llama.cpp reads"),
        ("verify docs", "it is a folder of documents, which data.train or data.heldout of a recipe can name"),
        ("train docs", "it is a folder of documents"),
        ("report base", "it is a checkpoint; `yarn-tune verify base` reads one"),
        ("eval bare docs/a.txt --length 8", "bare has no tokenizer; copy the tokenizer files of the model"),
        ("verify org/not-here", "run `hf download org/not-here`"),
        (
            f"verify base --engine vllm --engine-python {sys.executable}",
            "has no vLLM; run `pip install vllm` in an environment of its own",
        ),
        ("verify base --engine vllm --engine-python nowhere", "--engine-python: 'nowhere' cannot be run"),
    ],
)
def test_the_message_describes_what_was_named(folder, monkeypatch, capsys, words, answer):
    monkeypatch.chdir(folder)
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert answer in " ".join(said.split())
    assert "Traceback" not in said


def test_init_keeps_globs_as_they_were_quoted(folder, monkeypatch, capsys):
    """The recipe names the glob, so that documents added later are read."""
    monkeypatch.chdir(folder)
    for name in ("train", "other"):
        (folder / name).mkdir()
        (folder / name / "1.txt").write_text(f"{name} " + "w1 w2 " * 300)
    assert (
        main(
            [
                "init",
                "base",
                "--window",
                "256",
                "--train",
                "train/*.txt",
                "--heldout",
                "other/*.txt",
                "--out",
                "made.yaml",
            ]
        )
        == 0
    )
    made = yaml.safe_load((folder / "made.yaml").read_text())
    assert made["data"]["train"] == ["train/*.txt"]
    assert made["data"]["heldout"] == ["other/*.txt"]
