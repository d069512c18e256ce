"""Uploads, through huggingface_hub itself, to a stand-in of the hub's HTTP API on this machine."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny import finished_run, recipe_tree, save_tiny
from yarn_tune.cli.main import main
from yarn_tune.errors import CheckFailed, UserError
from yarn_tune.export.checkpoint import export
from yarn_tune.export.hub import prepare_upload
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.runs.folder import Run
from yarn_tune.serving.verification import verify
from yarn_tune.training.loop import train

TOKEN = "hf_standin"


class Hub(ThreadingHTTPServer):
    """Repositories as dictionaries of files; large ones come as LFS objects, as on the hub."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.asked: list[str] = []
        self.failing: str | None = None


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def say(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        repo = self.path.removeprefix("/api/models/").split("/revision/")[0]
        if repo in self.server.repos:
            self.say({"id": repo, "modelId": repo, "sha": "0" * 40, "siblings": []})
        else:
            self.say({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        self.server.objects[self.path.rsplit("/", 1)[1]] = self.body()
        self.say({})

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        content = self.body()
        if self.path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.say({"error": "Invalid username or password."}, 401)
        if self.server.failing is not None and self.server.failing in self.path:
            return self.say({"error": "You don't have the rights to create a model under this namespace"}, 403)
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repos.setdefault(repo, {})
            self.server.private.setdefault(repo, asked.get("private") or asked.get("visibility") == "private")
            return self.say({"url": f"{self.server.address}/{repo}", "name": repo, "id": "1"})
        if "/preupload/" in self.path:
            files = json.loads(content)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False, "oid": None} for f in files]  # fmt: skip
            return self.say({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(content)["objects"]
            hrefs = {o["oid"]: {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}} for o in wanted}
            links = [{"oid": o["oid"], "size": o["size"], "actions": hrefs[o["oid"]]} for o in wanted]
            return self.say({"transfer": "basic", "objects": links})
        if "/commit/" in self.path:
            return self.commit(content)
        return self.say({"error": f"unknown: {self.path}"}, 404)

    def commit(self, content: bytes) -> None:
        repo = self.path.removeprefix("/api/models/").split("/commit/")[0]
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                data = self.server.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                self.server.repos[repo][value["path"]] = data
        address = f"{self.server.address}/{repo}/commit/{'1' * 40}"
        self.say({"success": True, "commitOid": "1" * 40, "commitUrl": address})


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Trained, exported, with its card and its adapter."""
    folder = tmp_path_factory.mktemp("run")
    base = save_tiny(folder / "base")
    (base / "README.md").write_text("---\nlicense: llama2\n---\n")
    made = Run(parse_recipe(recipe_tree(base, folder), ["rope.query_gains=pair", "train.steps=2"]), folder / "run")
    train(made)
    export(made)
    return made


def push(hub: Hub, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose hub is ours."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-m", "yarn_tune", "push", *words]
    return subprocess.run(command, env=clean | own, capture_output=True, text=True, timeout=120)


def test_an_export_arrives_as_it_is(hub, run):
    said = push(hub, str(run.folder), "lab/long", "--base", "org/base", "--private", "--upload", "--message", "first")
    assert said.returncode == 0, said.stderr
    assert f"{hub.address}/lab/long/commit/" in said.stdout
    found, folder = hub.repos["lab/long"], run.folder / "export"
    assert hub.private["lab/long"] is True
    assert hub.messages == ["first"]
    assert set(found) == {path.name for path in folder.iterdir()}
    for name in ("config.json", "model.safetensors", "tokenizer.json", "fidelity.json"):
        assert found[name] == (folder / name).read_bytes()
    card = found["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/base"
    assert yaml.safe_load(card.split("---")[1])["license"] == "llama2"
    assert "vllm serve lab/long --max-model-len" in card
    assert 'from_pretrained("lab/long"' in card
    assert not [name for name, content in found.items() if str(run.folder.parent).encode() in content]


def test_an_adapter_arrives_with_a_card(hub, run, tmp_path):
    said = push(hub, str(run.folder), "lab/adapter", "--adapter", "--base", "org/base", "--upload")
    assert said.returncode == 0, said.stderr
    found = hub.repos["lab/adapter"]
    assert set(found) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert yaml.safe_load(found["README.md"].decode().split("---")[1]) == {
        "base_model": "org/base", "library_name": "peft", "license": "llama2", "tags": ["yarn_tune"]
    }  # fmt: skip
    (tmp_path / "a.safetensors").write_bytes(found["adapter_model.safetensors"])
    assert (
        load_file(tmp_path / "a.safetensors").keys()
        == load_file(run.folder / "adapter/adapter_model.safetensors").keys()
    )
    assert not [name for name, content in found.items() if str(run.folder.parent).encode() in content]


def test_nothing_is_uploaded_unless_asked(hub, run):
    said = push(hub, str(run.folder), "lab/long", "--base", "org/base")
    assert said.returncode == 0
    assert "Nothing was uploaded.\n\nnext: the same command with --upload" in said.stdout
    assert "model.safetensors" in said.stdout
    assert hub.asked == []


def test_twice_is_a_second_commit(hub, run):
    for message in ("one", "two"):
        assert push(hub, str(run.folder), "lab/x", "--base", "org/b", "--upload", "--message", message).returncode == 0
    assert hub.messages == ["one", "two"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HF_TOKEN": "hf_wrong"}, "Invalid username or password"),
        ({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused"),
    ],
)
def test_a_hub_that_refuses_is_one_message(hub, run, environment, reason):
    said = push(hub, str(run.folder), "lab/long", "--base", "org/base", "--upload", **environment)
    assert said.returncode == 2
    assert reason in said.stderr
    assert "lab/long: not uploaded" in said.stderr
    assert "Traceback" not in said.stderr
    assert hub.repos == {}


@pytest.mark.parametrize("place", ["/api/repos/create", "/commit/"])
def test_no_rights(hub, run, place):
    hub.failing = place
    said = push(hub, str(run.folder), "lab/long", "--base", "org/base", "--upload")
    assert said.returncode == 2
    assert "don't have the rights" in said.stderr
    assert not hub.repos.get("lab/long")


def test_what_is_no_longer_served_as_learned_is_refused(copied):
    folder = copied
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "rope_scaling"):
        config[key]["long_factor"][-1] *= 1.1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckFailed, match="not served as it was learned"):
        prepare_upload(folder, "lab/long", "org/base")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "lab/long"), "the base is named by a path"),
        (("run", "not a name", "--base", "o/b"), "is not a name of a repository"),
        (("run/checkpoints", "lab/long"), "neither an export"),
        (("missing", "lab/long"), "neither an export"),
    ],
)
def test_mistakes(run, monkeypatch, capsys, words, message):
    monkeypatch.chdir(run.folder.parent)
    assert main(["push", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_export_without_a_card_is_refused(tmp_path):
    made = finished_run(tmp_path, "scale")
    (export(made) / "README.md").unlink()
    with pytest.raises(UserError, match="has no model card"):
        prepare_upload(made.folder, "lab/long", "org/base")


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of the export, to edit."""
    return Path(shutil.copytree(run.folder / "export", tmp_path / "edited"))


def test_an_edited_card_is_uploaded_as_it_is(hub, copied, capsys):
    """A card is a text for people: its edit is a note of verify and push, and the uploaded copy has no changed file."""
    card = copied / "README.md"
    card.write_text(card.read_text() + "\nTested by us.\n")
    assert main(["verify", str(copied)]) == 0
    assert "note: README.md: changed since it was exported\n" in capsys.readouterr().out
    said = push(hub, str(copied), "lab/long", "--base", "org/base", "--upload")
    assert said.returncode == 0, said.stderr
    assert f"{card} was edited since the export; it is uploaded as it is now." in said.stdout
    found = hub.repos["lab/long"]
    assert b"Tested by us." in found["README.md"]
    assert b"base_model: org/base" in found["README.md"]
    for name, content in found.items():
        (copied / name).write_bytes(content)
    assert verify(str(copied)).traps == []


def test_an_untouched_card_is_not_mentioned(run):
    assert "edited" not in prepare_upload(run.folder, "lab/long", "org/base").text()


def test_a_base_that_was_named_in_the_card_by_hand(run, copied):
    """With the base's name on the hub in the card, --base is not needed, and no other file keeps the local path."""
    card, base = copied / "README.md", str(run.recipe.base.model)
    card.write_text(card.read_text().replace(base, "org/base"))
    files = prepare_upload(copied, "lab/long").files
    contents = {name: f if isinstance(f, bytes) else f.read_bytes() for name, f in files.items()}
    assert b"org/base" in contents["SERVING.md"]
    assert not [name for name, content in contents.items() if base.encode() in content]


def test_a_card_that_the_hub_would_not_take_is_refused(copied):
    card = copied / "README.md"
    card.write_bytes(card.read_bytes() + "caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="not valid UTF-8 at byte .*; save it as UTF-8"):
        prepare_upload(copied, "lab/long", "org/base")


def test_a_card_without_a_base_is_refused(copied):
    (copied / "README.md").write_text("# Ours\n")
    with pytest.raises(UserError, match="write `base_model: ORG/NAME`"):
        prepare_upload(copied, "lab/long", "org/base")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "SERVING.md"]
)
def test_an_edit_of_any_other_file_is_refused(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[-3] ^= 1 if name.endswith(".safetensors") else 0
    (copied / name).write_bytes(bytes(content) + (b"" if name.endswith(".safetensors") else b"\n"))
    with pytest.raises(CheckFailed, match=f"{name}: changed since it was exported"):
        prepare_upload(copied, "lab/long", "org/base")


def test_a_link_out_of_the_folder_is_refused(copied, tmp_path):
    (tmp_path / "secret").write_text("key")
    (copied / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"notes.txt is a link to .*secret, outside of the folder to upload"):
        prepare_upload(copied, "lab/long", "org/base")


def test_a_base_from_the_hub_keeps_its_name(run, tmp_path):
    card = Path(run.folder / "export" / "README.md").read_text()
    assert str(run.recipe.base.model) in card
    files = prepare_upload(run.folder, "lab/long", "org/base").files
    assert isinstance(files["model.safetensors"], Path)
    assert b"org/base" in files["README.md"]
