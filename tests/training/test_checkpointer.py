"""The checkpointer: it restores the saved state, and refuses files of other models."""

import pytest
import torch
from safetensors.torch import save_file

from variant.errors import UserError
from variant.paths import file_sha256
from variant.training.checkpointer import Checkpointer
from variant.training.run_state import RunState


def new_state(seed):
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    return RunState(module, optimizer, torch.amp.GradScaler("cpu", enabled=False))


def train_step(state):
    state.optimizer.zero_grad()
    state.module(torch.rand(4, 3)).square().sum().backward()
    state.optimizer.step()
    state.step += 1


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path, "vae")


@pytest.fixture
def state(checkpointer):
    """A state of three steps, with its checkpoint and best weights in files."""
    state = new_state(seed=1)
    for _ in range(3):
        train_step(state)
    state.add_loss("full", 2.0)
    state.history = [
        {
            "epoch": 1,
            "step": 3,
            "seconds": 1.5,
            "train": {"full": 2.0},
            "held_out": {"full": 3.0},
            "held_out_mean": 3.0,
        }
    ]
    checkpointer.save_best(state)
    checkpointer.save(state, recipe={"seed": 0}, inputs={"num_train": 4}, total_steps=9)
    return state


def test_a_restored_state_continues_as_the_saved_one(checkpointer, state):
    train_step(state)
    restored = new_state(seed=2)
    checkpointer.restore(restored, checkpointer.read())
    assert (restored.step, restored.loss_sums) == (3, {"full": (2.0, 1)})
    assert restored.history == state.history
    train_step(restored)  # with the same random batch
    for left, right in zip(state.module.parameters(), restored.module.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_checkpoint_holds_what_identifies_the_run(checkpointer, state):
    saved = checkpointer.read()
    assert (saved["recipe"], saved["inputs"]) == ({"seed": 0}, {"num_train": 4})
    assert (saved["step"], saved["total_steps"]) == (3, 9)


def test_the_best_weights_outlast_further_steps(checkpointer, state):
    best = {key: value.clone() for key, value in state.module.state_dict().items()}
    train_step(state)
    assert not torch.equal(state.module.weight, best["weight"])
    checkpointer.load_best(state)
    assert torch.equal(state.module.weight, best["weight"])


def test_moments_of_another_shape_are_refused(checkpointer, state):
    saved = checkpointer.read()
    saved["optimizer"]["state"][0]["exp_avg_sq"] = torch.zeros(2, 2)
    with pytest.raises(UserError, match=r"is damaged: optimizer: exp_avg_sq is \(2, 2\)"):
        checkpointer.restore(new_state(seed=2), saved)


def test_a_missing_part_is_named(checkpointer, state):
    saved = checkpointer.read()
    del saved["random"]["numpy"]
    with pytest.raises(UserError, match=r"is damaged: it has no 'numpy'"):
        checkpointer.restore(new_state(seed=2), saved)


def test_a_history_that_json_cannot_hold_is_refused(checkpointer, state):
    state.history[0]["held_out_mean"] = torch.zeros(1)
    checkpointer.save(state, recipe={}, inputs={}, total_steps=9)
    with pytest.raises(UserError, match=r"is damaged: history\[0\]: held_out_mean"):
        checkpointer.read()


def test_best_weights_of_another_model_are_refused(checkpointer, state):
    save_file({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, checkpointer.best)
    with pytest.raises(UserError, match=r"is not the file whose SHA-256 vae-last.pt records"):
        checkpointer.restore(new_state(seed=2), checkpointer.read())


def test_a_checkpoint_of_another_kind_is_refused(checkpointer, state):
    checkpointer.last.rename(checkpointer.last.with_name("var-last.pt"))
    with pytest.raises(UserError, match=r'must be "variant-train-3" and "var"; got .* and \'vae\''):
        Checkpointer(checkpointer.last.parent, "var").read()


def write_again(checkpointer, state):
    train_step(state)
    checkpointer.save_best(state)
    checkpointer.save(state, recipe={"seed": 0}, inputs={"num_train": 4}, total_steps=9)


def test_an_older_checkpoint_has_the_best_weights_that_it_records(checkpointer, state, tmp_path):
    resumed = Checkpointer(tmp_path, "vae", keep=2)
    resumed.restore(state, resumed.read())
    write_again(resumed, state)
    older = tmp_path / "vae-step-00000003.pt"
    assert resumed.read_from(older)["best_sha256"] == file_sha256(resumed.files.best_of(older))
    # As of a run that was killed before newer best weights of a folder were in place.
    recorded = resumed.read()["best_sha256"]
    resumed.save_best(state)
    train_step(state)
    resumed.save_best(state)
    resumed.check_best({"best_sha256": resumed.best_sha256})
    assert file_sha256(resumed.best) != recorded
    write_again(resumed, state)
    assert not (tmp_path / "vae-step-00000004.pt").exists()
    assert resumed.path == resumed.last
