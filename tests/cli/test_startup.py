"""Help, the version and mistakes are answered without importing torch or transformers."""

import subprocess
import sys
from pathlib import Path

import pytest
import yarn_tune

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "accelerate", "peft", "datasets")
MAIN = f"""
import sys
from yarn_tune.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
found = [name for name in {HEAVY} if name in sys.modules]
print("imported:", *found, file=sys.stderr)
sys.exit(code)
"""
DEMO = "recipes/tiny-demo.yaml"
ANSWERS = [
    ([], 0, "COMMAND"),
    (["--help"], 0, "COMMAND"),
    (["train", "--help"], 0, "key=value"),
    (["--version"], 0, f"yarn-tune {yarn_tune.__version__}"),
    (["recipes"], 0, "tiny-demo"),
    (["trian", DEMO], 2, "unknown command 'trian'; did you mean 'train'?"),
    (["plan", "recipes/tiny-dmo.yaml"], 2, "no such file; did you mean recipes/tiny-demo.yaml?"),
    (["plan", "recipes/tiny-demo"], 2, "no such file; did you mean recipes/tiny-demo.yaml?"),
    (["plan", "data/tiny-base"], 2, "it is a checkpoint; `yarn-tune verify data/tiny-base` reads one"),
    (["train", DEMO, "train.stops=5"], 2, "train.stops: unknown key; did you mean 'steps'?"),
    (["train", DEMO, "steps=5"], 2, "steps: unknown key; did you mean 'train.steps'?"),
    (["train", DEMO, "--steps", "5"], 2, "did you mean train.steps=5?"),
    (["train", DEMO, "--steps=5"], 2, "did you mean train.steps=5?"),
    (["train", DEMO, "--jsno"], 2, "--jsno: unknown flag; did you mean '--json'?"),
    (["train", DEMO, "data.train=[nowhere.txt]"], 2, "data.train: no file matches 'nowhere.txt' in "),
    (["train", DEMO, "data.train=[recipes/accelerate]"], 2, "'recipes/accelerate' is a folder without documents"),
    (["train", DEMO, "base.model=data/nowhere"], 2, "there is no such file or folder"),
    (["train", "recipes/smollm2-135m-16k.yaml", "base.model=data/nowhere"], 2, "run `python data/smollm2/prepare.py`"),
    (["compare", DEMO, "recipes"], 2, "recipes is neither a run folder (with recipe.yaml) nor a checkpoint"),
    (["verify", "nowhere"], 2, "neither a checkpoint folder (with config.json) nor a hub id"),
    (["verify", DEMO], 2, f"it is a recipe; `yarn-tune plan {DEMO}` reads one"),
    (["verify", "data/tiny-base", "--for", "vlm"], 2, "--for: unknown stack 'vlm'; did you mean 'vllm'?"),
    (["eval", "data/sample", "x.txt", "--length", "8"], 2, "neither a checkpoint folder"),
    (["eval", "data/tiny-base", "missing.txt", "--length", "8"], 2, "documents: no file matches 'missing.txt'"),
    (["init", "data/tiny-base", "--window", "512", "--train", "a.txt", "--heldout", "b.txt"], 2, "--train: no file"),
    (["retrieve", "data/tiny-base", "README.md", "--lengths", "64", "--picture", "no/map.png"], 2, "no folder 'no'"),
]


@pytest.mark.parametrize(("arguments", "code", "answer"), ANSWERS, ids=[" ".join(a[0]) or "alone" for a in ANSWERS])
def test_answers_without_torch(arguments, code, answer):
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == code, done.stderr
    assert answer in (done.stderr if code else done.stdout)
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "imported:"
