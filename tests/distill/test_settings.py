"""What single settings do to a run: precision, a trained teacher, judging alone, TensorBoard, a schedule, a warm-up."""

import numpy
import pytest
import torch
from distill_helpers import QUICK, SHORT, read_log, train
from PIL import Image

from vrm_distill import create_model, load_checkpoint, recipe
from vrm_distill.cli import main

RUN = [*QUICK, *SHORT, "--baselines=none", "--seeds=1", "--output-dir"]


@pytest.fixture(autouse=True)
def _accelerate():
    """accelerate keeps the precision of a process for good."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings") / "run"
    assert train(*RUN, folder) == 0
    return folder


def _losses(folder):
    return [float(row["train_loss"]) for row in read_log(folder)]


def test_bf16_trains_in_bfloat16_and_keeps_float32_weights(finished, tmp_path, monkeypatch):
    seen = set()
    both_views = recipe.both_views

    def spying(student, *views):
        hook = student.features[0].register_forward_hook(lambda module, images, out: seen.add(out.dtype))
        try:
            return both_views(student, *views)
        finally:
            hook.remove()

    monkeypatch.setattr(recipe, "both_views", spying)
    assert train(*RUN, tmp_path / "run", "--precision=bf16") == 0
    assert seen == {torch.bfloat16}
    model, _ = load_checkpoint(tmp_path / "run" / "student.safetensors")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert _losses(tmp_path / "run") != _losses(finished)
    assert _losses(tmp_path / "run") == pytest.approx(_losses(finished), rel=0.05)


@pytest.mark.parametrize("kind", ["ours", "state dict"])
def test_trained_teacher_is_taken_as_it_is(kind, finished, tmp_path, capsys):
    file = finished / "teacher.safetensors"
    teacher, metadata = load_checkpoint(file)
    if kind == "state dict":
        file = tmp_path / "teacher.pth"
        torch.save({"state_dict": {f"module.{k}": v for k, v in teacher.state_dict().items()}, "epoch": 3}, file)
    assert train(*RUN, tmp_path / "run", "--teacher-checkpoint", str(file)) == 0
    rows, said = read_log(tmp_path / "run"), capsys.readouterr().out
    assert said.index(f"teacher: {float(metadata['test_accuracy']):.1%} of the test images") < said.index("seed 5: ")
    assert "digits: 10 classes; 128 images to train, 297 to validate, 600 to test; 8x8, 1 channel" in said
    assert [(row["method"], row["epoch"]) for row in rows] == [("teacher", "0"), ("distilled", "1"), ("distilled", "2")]
    assert float(rows[0]["test_accuracy"]) == pytest.approx(float(metadata["test_accuracy"]), abs=1e-5)
    assert not (tmp_path / "run" / "teacher.safetensors").exists()
    before = [row for row in read_log(finished) if row["method"] == "distilled"]
    assert [row["train_loss"] for row in rows[1:]] == [row["train_loss"] for row in before]


def test_evaluate_takes_the_checkpoints_image_size(finished, tmp_path, capsys):
    numbers = numpy.random.default_rng(0).integers(0, 255, (40, 12, 12), dtype="uint8")
    for i, pixels in enumerate(numbers):
        file = tmp_path / "train" / str(i % 10) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    arguments = ["eval", str(finished / "student.safetensors"), f"--dataset=folder:{tmp_path}", "--device=cpu"]
    assert main(arguments) == 0
    assert "note: " not in capsys.readouterr().out
    assert main([*arguments, "--image-size=16"]) == 0
    assert "note: trained on images of 8x8, judged on 16x16" in capsys.readouterr().out


def test_evaluate_judges_a_checkpoint(finished, capsys):
    file = finished / "student.safetensors"
    _, metadata = load_checkpoint(file)
    assert main(["eval", str(file), "--device=cpu"]) == 0
    right = round(600 * float(metadata["test_accuracy"]))
    assert f"{right} of 600 test images of digits" in capsys.readouterr().out


def test_tensorboard_has_the_logs_values(finished, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(*RUN, tmp_path / "run", "--track=tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "vrm-distill"))
    events.Reload()
    logged = [event.value for event in events.Scalars("distilled-5/inter_sample")]
    rows = [row for row in read_log(tmp_path / "run") if row["method"] == "distilled"]
    assert logged == pytest.approx([float(row["inter_sample"]) for row in rows], rel=1e-4)


def test_schedule_and_warm_up(tmp_path):
    arguments = [*RUN, tmp_path / "run", "--epochs=4", "--schedule=step", "--milestones", "1", "3"]
    assert train(*arguments, "--gamma=0.5", "--relation-warmup=2") == 0
    rows = [row for row in read_log(tmp_path / "run") if row["method"] == "distilled"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.03, 0.015, 0.015, 0.0075])
    for epoch, row in enumerate(rows):
        ce = float(row["ce_real"]) + float(row["ce_virtual"])
        relations = 2 * float(row["inter_sample"]) + float(row["inter_class"])
        weight = (float(row["train_loss"]) - ce) / relations
        # Four steps an epoch: the weights are 0, 1/8 ... 7/8, then 1; the relations fall as they rise, hence the room.
        assert weight == pytest.approx((1.5 / 8, 5.5 / 8, 1, 1)[epoch], abs=0.02 if epoch < 2 else 1e-4)


def test_running_mean_is_what_is_judged_and_kept(finished, tmp_path):
    assert train(*RUN, tmp_path / "run", "--ema=0.99") == 0
    a, b = (load_checkpoint(folder / "student.safetensors")[0] for folder in (finished, tmp_path / "run"))
    torch.manual_seed(5)
    start = create_model("conv_4_8_8", 1, 10)

    def moved(model):
        return sum(
            float((p - q).detach().square().sum()) for p, q in zip(model.parameters(), start.parameters(), strict=True)
        )

    assert 0 < moved(b) < 0.5 * moved(a)
    # The training itself is the same: the teacher's, that is, since the student's is on the teacher that is kept.
    with_mean, without = (
        [r["train_loss"] for r in read_log(f) if r["method"] == "teacher"] for f in (tmp_path / "run", finished)
    )
    assert with_mean == without


def test_trackers_that_are_not_installed_are_refused_and_installed_ones_get_every_epoch(tmp_path, monkeypatch, capsys):
    from vrm_distill import log

    find_spec = log.importlib.util.find_spec
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(SystemExit):
        main([*RUN, str(tmp_path / "run"), "--track", "wandb"])
    assert "argument --track: wandb not installed: pip install wandb" in capsys.readouterr().err

    class Tracker:
        def __init__(self, name):
            self.name, self.got = name, []

        def log(self, values, **step):
            self.got.append((values, step))

    trackers = [Tracker("wandb"), Tracker("mlflow")]
    with log.Log(tmp_path / "log.csv", trackers=trackers) as writer:
        writer.add({"run": "r", "method": "distilled", "seed": 5, "epoch": 3, "train_loss": 0.5})
    assert trackers[0].got == [({"distilled-5/train_loss": 0.5}, {})]
    assert trackers[1].got == [({"distilled-5/train_loss": 0.5}, {"step": 3})]


def test_compiled_by_accelerates_launcher(finished, tmp_path, monkeypatch):
    """``accelerate launch --dynamo_backend X`` says so in the environment; the student's keys stay its own."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert train(*RUN, tmp_path / "run", "--ema=0.5") == 0
    compiled, plain = (load_checkpoint(f / "student.safetensors")[0] for f in (tmp_path / "run", finished))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
