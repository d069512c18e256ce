"""State on disk: whole or not at all, the newest good one wins."""

import shutil

import pytest
import torch
from yarn_tune.runs.checkpoint import State, latest_state, load_optimizer_tensors, optimizer_tensors, save_state


def state(step: int) -> State:
    return State(step, {"a": torch.full((3,), float(step))}, {"0.exp_avg": torch.ones(3) * step})


def test_round_trip_and_rotation(tmp_path):
    assert latest_state(tmp_path / "none") is None
    for step in range(1, 6):
        save_state(tmp_path, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]
    found = latest_state(tmp_path)
    assert found.step == 5
    assert torch.equal(found.numbers["a"], torch.full((3,), 5.0))
    assert torch.equal(found.optimizer["0.exp_avg"], torch.ones(3) * 5)


@pytest.mark.parametrize("damage", ["truncate", "flip", "no json", "half json", "no tensors", "partial folder"])
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage):
    for step in (1, 2):
        save_state(tmp_path, state(step), keep=3)
    last = tmp_path / "step-000002"
    tensors, meta = last / "state.safetensors", last / "state.json"
    content = tensors.read_bytes()
    if damage == "truncate":
        tensors.write_bytes(content[:-5])
    elif damage == "flip":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no json":
        meta.unlink()
    elif damage == "half json":
        meta.write_text(meta.read_text()[:10])
    elif damage == "no tensors":
        tensors.unlink()
    else:
        shutil.move(last, tmp_path / ".step-000002.partial")
    assert latest_state(tmp_path).step == 1
    save_state(tmp_path, state(2), keep=3)
    assert latest_state(tmp_path).step == 2


def test_optimizer_state_continues_exactly():
    def fresh():
        parameter = torch.nn.Parameter(torch.ones(4))
        return parameter, torch.optim.AdamW([parameter], lr=0.1)

    def step(parameter, optimizer):
        parameter.grad = parameter.detach() ** 2
        optimizer.step()

    parameter, optimizer = fresh()
    for _ in range(3):
        step(parameter, optimizer)
    other, resumed = fresh()
    with torch.no_grad():
        other.copy_(parameter)
    load_optimizer_tensors(resumed, optimizer_tensors(optimizer))
    for _ in range(2):
        step(parameter, optimizer)
        step(other, resumed)
    assert torch.equal(parameter, other)
