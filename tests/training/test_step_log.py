"""What a run reports while it trains: the lines of its steps, and that they change nothing."""

import dataclasses
import errno
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import open_recipe_data
from test_loss_scale import fp16_trainer
from tiny_runs import CPU, interrupt_after, metrics, quiet, tiny_recipe

from variant import VARiant
from variant.engine.grid import grid
from variant.engine.images import to_pil
from variant.errors import UserError
from variant.models.flops import training_flop
from variant.training.configurations import Configurations
from variant.training.distributed import Ranks
from variant.training.gpu_peaks import peak_rate
from variant.training.logging_section import LoggingSection
from variant.training.loss_scale import LossScaler
from variant.training.step_log import StepLog
from variant.training.tensorboard import TensorBoard
from variant.training.trainer import Trainer
from variant.training.vae_task import VAETask, train_vae
from variant.training.var_task import VARTask, train_var

EVERY = 3  # of 8 steps, two an epoch
CLOCKED = ("speed/", "data/", "memory/", "time/")  # differ from run to run


def lines_of(folder, kind="var"):
    return [json.loads(line) for line in (folder / f"{kind}-steps.jsonl").read_text().splitlines()]


def without_clock(lines):
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKED)} for line in lines]


@pytest.fixture
def chosen(recipe):
    return dataclasses.replace(recipe, logging=LoggingSection(every=EVERY))


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """The folder of a run, its lines, the losses of its steps by number, its console's output."""
    chosen = dataclasses.replace(tiny_recipe(folders), logging=LoggingSection(every=EVERY))
    folder = tmp_path_factory.mktemp("run")
    train_vae(chosen, folder, console=quiet(), device=CPU)
    losses, train_step = {}, Trainer._train_step

    def watched(self):
        losses[self.state.step] = self.task.name_of_step(self.state.step), train_step(self)
        return losses[self.state.step][1]

    console = quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", watched)
        train_var(chosen, folder, console=console, device=CPU)
    return folder, lines_of(folder), losses, console.file.getvalue()


@pytest.fixture
def with_vae(run, tmp_path):
    """A folder that holds the trained VQ-VAE only."""
    for path in run[0].glob("vae-*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_a_line_has_what_its_steps_measured(run, chosen):
    folder, lines, losses, printed = run
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8]
    assert [line["epoch"] for line in lines] == [1, 1.5, 2, 3, 4]
    history = metrics(folder)
    before = 0
    for line in lines:
        steps = [losses[step] for step in range(before, line["step"])]
        before = line["step"]
        for name in ("full", "2"):
            own = [loss for key, loss in steps if key == name]
            assert (f"loss/{name}" in line) is bool(own)
            if not own:
                continue
            assert line[f"loss/{name}"] == pytest.approx(sum(own) / len(own), rel=1e-5)
            # The scales have 1, 4 and 16 tokens.
            parts = [line[f"loss_by_scale/{name}/{k}"] for k in range(3)]
            mean = (parts[0] + 4 * parts[1] + 16 * parts[2]) / 21
            assert mean == pytest.approx(line[f"loss/{name}"], rel=1e-5)
            norms = [line[f"gradient_norm/{name}/{g}"] for g in ("all", "shared", "full_only")]
            assert 0 < max(norms[1:]) < norms[0]
        assert line["optim/learning_rate"] == chosen.optim.learning_rate
        epoch = (line["step"] - 1) / 2
        probability = chosen.schedule.probability(epoch)
        assert line["schedule/subnet_probability"] == pytest.approx(probability)
        assert line["speed/images_per_second"] > 0
        assert 0 < line["data/share_waited"] < 1
        assert line["memory/resident_bytes"] > 2**26
        if line["step"] % 2 == 0:
            entry = history[line["step"] // 2 - 1]
            for name in ("full", "2"):
                assert line[f"held_out/{name}"] == entry["held_out"][name]
                parts = entry["held_out_by_scale"][name]
                assert parts == [line[f"held_out_by_scale/{name}/{k}"] for k in range(3)]
                mean = (parts[0] + 4 * parts[1] + 16 * parts[2]) / 21
                assert mean == pytest.approx(entry["held_out"][name], rel=1e-5)
        else:
            assert not any(key.startswith("held_out") for key in line)
    waited = [line["data/seconds_waited"] for line in lines]
    assert waited == sorted(waited)
    assert waited[-1] > 0
    texts = printed.splitlines()
    assert [text.split("  ")[0] for text in texts if text.startswith("var step")] == [
        "var step 1/8",  # after the first step, wherever the first line of the file is
        "var step 3/8",
    ]
    assert sum(text.startswith("  held out by scale: full ") for text in texts) == 4


@pytest.mark.parametrize("step", [3, 4])  # the last of an epoch, and one within an interval
def test_a_resumed_run_reports_what_an_unbroken_one_does(run, chosen, with_vae, monkeypatch, step):
    parted = with_vae
    interrupt_after(monkeypatch, VARTask, step)
    with pytest.raises(SystemExit):
        train_var(chosen, parted, console=quiet(), device=CPU)
    waited = torch.load(parted / "var-last.pt", weights_only=True)["log"]["waited"]
    with (parted / "var-steps.jsonl").open("a") as file:  # of steps after the checkpoint
        file.write('{"step": 6}\n{"step": 7, "lo')
    train_var(chosen, parted, resume=True, console=quiet(), device=CPU)
    assert without_clock(lines_of(parted)) == without_clock(run[1])
    assert lines_of(parted)[-1]["data/seconds_waited"] > waited > 0


def test_no_setting_of_the_log_changes_a_weight(run, chosen, with_vae):
    other = dataclasses.replace(chosen, logging=LoggingSection(every=1))
    train_var(other, with_vae, console=quiet(), device=CPU)
    assert len(lines_of(with_vae)) == 8
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run[0], with_vae)]
    assert weights[0] == weights[1]


def _interval(recipe, size, saved, losses):
    """What is saved of an interval in which ``size`` processes go on from ``saved``."""
    setup = SimpleNamespace(recipe=recipe, optim=recipe.optim, device=CPU, folder=Path())
    task = SimpleNamespace(
        kind="var", module=torch.nn.Linear(1, 1), layer_groups=dict, seconds_waited=0.0
    )
    totals = []
    for rank in range(size):
        setup.ranks, setup.steps_per_epoch = Ranks(rank, size), 2
        log = StepLog(task, setup, None, LossScaler("cpu", enabled=False), 8, None)
        log._load(saved)
        for loss in losses:
            log.add_loss("full", loss)
        totals.append(log.meters.totals()["loss/full"])
    rest = {"steps": 0, "seconds": 0.0, "flop": 0, "waited": 0.0, "waited_before": 0.0}
    return {"meters": {"loss/full": torch.tensor(totals).sum(0).tolist()}, **rest}


@pytest.mark.parametrize("sizes", [(1, 4), (4, 1), (2, 2)])
def test_a_step_weighs_the_same_after_a_change_of_the_number_of_processes(chosen, sizes):
    saved = _interval(chosen, sizes[0], {}, [1.0, 2.0, 3.0])
    total, weight = _interval(chosen, sizes[1], saved, [8.0])["meters"]["loss/full"]
    assert total / weight == (1 + 2 + 3 + 8) / 4


def test_the_vqvae_reports_the_parts_of_its_loss(chosen, tmp_path):
    train_vae(chosen, tmp_path, console=quiet(), device=CPU)
    lines = lines_of(tmp_path, "vae")
    assert [line["step"] for line in lines] == [2, 3, 4]
    for line in lines:
        parts = line["loss/reconstruction"] + line["loss/quantization"]
        assert line["loss/loss"] == pytest.approx(parts, rel=1e-5)
        assert line["gradient_norm/loss/all"] > 0
        assert "schedule/subnet_probability" not in line
    assert {"held_out/reconstruction"} <= lines[-1].keys()


def test_a_full_disk_costs_lines_and_not_the_run(chosen, tmp_path):
    (tmp_path / "vae-steps.jsonl").symlink_to("/dev/full")
    console = quiet()
    assert train_vae(chosen, tmp_path, console=console, device=CPU).steps == 4
    assert "vae step 2: [Errno 28] No space left on device" in console.file.getvalue()


def test_curves_that_cannot_be_written_do_not_end_the_run(chosen, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard.writer import SummaryWriter

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("add_scalar", "flush", "close"):
        monkeypatch.setattr(SummaryWriter, name, full)
    shown = dataclasses.replace(chosen, logging=LoggingSection(tensorboard=True))
    console = quiet()
    assert train_vae(shown, tmp_path, console=console, device=CPU).steps == 4
    assert console.file.getvalue().count("No space left on device; the run goes on") == 5


def test_a_step_that_overflowed_has_no_gradient_norm(chosen, tmp_path):
    trainer = fp16_trainer(chosen, tmp_path, [False, True, True, True])
    for _ in range(3):
        trainer._train_step()
        trainer.state.step += 1
    trainer.log.close_interval()
    trainer.log.write()
    trainer._train_step()
    trainer.state.step += 1
    trainer.log.close_interval()
    trainer.log.write()
    first, second = lines_of(tmp_path, "vae")
    assert (first["optim/loss_scale"], first["optim/skipped_steps"]) == (2**9, 2)
    assert 0 < first["gradient_norm/loss/all"] < 1
    assert (second["optim/loss_scale"], second["optim/skipped_steps"]) == (2**8, 3)
    assert "gradient_norm/loss/all" not in second
    assert "loss/loss" in second


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def curves(folder):
    """{key: [(step, value)]} of event files, as TensorBoard shows them."""
    events = events_of(folder)
    return {
        key: [(event.step, event.value) for event in events.Scalars(key)]
        for key in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_keys_and_values_of_the_file(run, chosen, with_vae, monkeypatch):
    pytest.importorskip("tensorboard")
    logging = LoggingSection(every=EVERY, tensorboard=True)
    shown = dataclasses.replace(chosen, logging=logging)
    interrupt_after(monkeypatch, VARTask, 4)
    with pytest.raises(SystemExit):
        train_var(shown, with_vae, console=quiet(), device=CPU)
    # A process that went on to step 7 and was killed leaves points that a resumed run repeats.
    writer = TensorBoard(with_vae / "tensorboard" / "var", 5)
    writer.scalars({"step": 6, "loss/full": 99.0})
    writer.close()
    train_var(shown, with_vae, resume=True, console=quiet(), device=CPU)
    lines = lines_of(with_vae)
    assert without_clock(lines) == without_clock(run[1])
    points = curves(with_vae / "tensorboard" / "var")
    assert points.keys() == {key for line in lines for key in line} - {"step"}
    for key, values in points.items():
        expected = [(line["step"], line[key]) for line in lines if key in line]
        assert values == [(step, pytest.approx(value)) for step, value in expected], key
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run[0], with_vae)]
    assert weights[0] == weights[1]


def test_without_the_package_tensorboard_its_setting_is_refused_at_the_start(
    chosen, tmp_path, monkeypatch
):
    monkeypatch.setattr("variant.training.tensorboard.importlib.util.find_spec", lambda name: None)
    shown = dataclasses.replace(chosen, logging=LoggingSection(tensorboard=True))
    with pytest.raises(UserError, match=r'tensorboard: pip install "variant-kernels\[train\]"'):
        train_vae(shown, tmp_path, console=quiet(), device=CPU)
    assert list(tmp_path.iterdir()) == []


def test_mfu_is_the_work_of_the_model_over_the_peak_and_the_time(chosen, with_vae, monkeypatch):
    monkeypatch.setattr("variant.training.step_log.peak_rate", lambda device, kind: (1e9, ""))
    console = quiet()
    train_var(chosen, with_vae, console=console, device=CPU)
    config, schedules = chosen.var_config, Configurations(chosen, 2)
    before = 0
    for line in lines_of(with_vae):
        steps = range(before, line["step"])
        before = line["step"]
        flop = sum(training_flop(config, schedules.of_step(step).schedule, 12) for step in steps)
        seconds = len(steps) * 12 / line["speed/images_per_second"]
        assert line["speed/mfu"] == pytest.approx(flop / seconds / 1e9)
    assert ", MFU " in console.file.getvalue()


def test_a_device_without_a_known_peak_has_no_mfu(run, monkeypatch):
    assert not any("speed/mfu" in line for line in run[1])
    assert "MFU" not in run[3]
    gpu = torch.device("cuda")
    names = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_rate(gpu, "bf16")[0] == peak
        assert (name in peak_rate(gpu, "bf16")[1]) is (peak is None)
        assert peak_rate(gpu, "fp32")[0] is None


def test_pictures_of_samples_change_no_weight(run, chosen, with_vae):
    pytest.importorskip("tensorboard")
    logging = LoggingSection(
        every=EVERY, tensorboard=True, samples_every=3, sample_labels=(1, 0, 1)
    )
    train_var(dataclasses.replace(chosen, logging=logging), with_vae, console=quiet(), device=CPU)
    pictures = sorted(path.name for path in with_vae.glob("*.png"))
    assert pictures == ["var-samples-0003.png", "var-samples-0004.png"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run[0], with_vae)]
    assert weights[0] == weights[1]
    assert without_clock(lines_of(with_vae)) == without_clock(run[1])
    images = events_of(with_vae / "tensorboard" / "var").Images("samples")
    assert [image.step for image in images] == [6, 8]
    with Image.open(with_vae / pictures[-1]) as picture:
        shown = np.asarray(picture)
    with Image.open(io.BytesIO(images[-1].encoded_image_string)) as picture:
        assert np.array_equal(np.asarray(picture), shown)
    model = VARiant.from_pretrained(with_vae)
    last = torch.load(with_vae / "var-last.pt", weights_only=True)  # the model may be of before
    model.var.load_state_dict(last["module"])
    rows = [model.generate([1, 0, 1], depth=d, seed=0, top_p=0.96).pil() for d in (None, 2)]
    assert np.array_equal(np.asarray(grid(rows, ["full", "depth 2"])), shown)


def test_pictures_of_the_vqvae_are_held_out_images_and_what_each_scale_adds(chosen, tmp_path):
    logging = LoggingSection(samples_every=2)
    train_vae(dataclasses.replace(chosen, logging=logging), tmp_path, console=quiet(), device=CPU)
    with Image.open(tmp_path / "vae-samples-0002.png") as picture:
        assert picture.size == (4 + 56 + 6 * 68, 4 + 4 * 68)  # original, to 1x1, to 2x2, to 4x4
        shown = np.asarray(picture)
    image = (open_recipe_data(chosen).held_out([0])[0] + 1) / 2
    assert np.array_equal(np.asarray(grid([to_pil(image)], ["original"])), shown[:72, :128])


def test_a_picture_that_cannot_be_made_does_not_end_the_run(chosen, tmp_path, monkeypatch):
    def fails(self, ranks):
        raise MemoryError("generate: 2 images need 9 GiB")

    monkeypatch.setattr(VAETask, "samples", fails)
    console = quiet()
    logged = dataclasses.replace(chosen, logging=LoggingSection(samples_every=1))
    assert train_vae(logged, tmp_path, console=console, device=CPU).steps == 4
    assert "vae step 2: generate: 2 images need 9 GiB; the run goes on" in console.file.getvalue()


@pytest.mark.parametrize(
    ("labels", "message"), [((2,), "sample_labels must be below 2"), ((0,) * 65, "at most 64")]
)
def test_labels_of_samples_are_checked(chosen, labels, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(chosen, logging=LoggingSection(sample_labels=labels))
