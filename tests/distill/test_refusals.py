"""``vrm-distill`` refuses a bad option before any work, naming the value and what to do."""

import dataclasses
import importlib.util
import subprocess
import sys

import distill_helpers  # noqa: F401 (skips these tests without the extra)
import pytest
import torch

from vrm_distill import cli, options, run_folder
from vrm_kernels import backends


def _refused(capsys, tmp_path, *arguments):
    """The message of a refused command line; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    if "--output-dir" not in arguments and arguments[:1] not in (("eval",), ("export",)):
        arguments = (*arguments, "--output-dir", str(tmp_path / "run"))
    with pytest.raises(SystemExit) as status:
        cli.main(arguments)
    assert status.value.code == 2
    assert sorted(tmp_path.rglob("*")) == before
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--dataset", "imagenet", "digits"),
        ("--dataset", "folder:nowhere", "does not exist"),
        ("--teacher", "resnet9000", "conv_32_64_128"),
        ("--student", "resnet9000", "conv_4_8_8"),
        ("--student", "torchvision:resnet18", "take 3 channels"),
        ("--baselines", "alone", "alone_both"),
        ("--precision", "fp16", "needs a GPU"),
        ("--accumulate", "3", "multiple of 3"),
        ("--ema", "1.5", "[0, 1]"),
        ("--image-size", "32", "has its own"),
        ("--teacher-checkpoint", "nowhere.safetensors", "No such file"),
        ("--backend", "fortran", "'reference'"),
        ("--device", "abacus", "cpu"),
        ("--device", "meta", "no values"),
        ("--device", "cuda:99", "use cpu"),
        ("--epochs", "0", "at least 1"),
        ("--epochs", "-3", "at least 1"),
        ("--epochs", "many", "whole number"),
        ("--teacher-epochs", "0", "at least 1"),
        ("--batch-size", "1", "at least 2"),
        ("--batch-size", "901", "900 training images"),
        ("--train-images", "19", "20 to 900"),
        ("--train-images", "901", "20 to 900"),
        ("--lr", "0", "> 0"),
        ("--lr", "nan", "> 0"),
        ("--teacher-lr", "inf", "finite"),
        ("--alpha", "-1", ">= 0"),
        ("--beta", "nan", ">= 0"),
        ("--percentile", "100.5", "[0, 100]"),
        ("--percentile", "-1", "[0, 100]"),
        ("--seeds", "0", "at least 1"),
        ("--seed", "-1", "at least 0"),
        ("--seed", "1.5", "whole number"),
        ("--threads", "0", "at least 1"),
    ],
)
def test_bad_value(option, value, wanted, capsys, tmp_path):
    batch = ("--batch-size", "8") if option == "--train-images" else ()
    message = _refused(capsys, tmp_path, option, value, *batch)
    blamed = {"--image-size": "--dataset", "--accumulate": "--batch-size"}.get(option, option)
    assert f"argument {blamed}" in message and wanted in message
    assert value in message or option == "--image-size"


def test_unknown_option(capsys, tmp_path):
    assert "--temperature" in _refused(capsys, tmp_path, "--temperature", "4")


def test_backend_that_cannot_run_here(capsys, tmp_path, monkeypatch):
    cpp = dataclasses.replace(backends.REGISTRY["cpp"], status=lambda device=None: (False, "it was never built"))
    monkeypatch.setitem(backends.REGISTRY, "cpp", cpp)
    message = _refused(capsys, tmp_path, "--backend", "cpp")
    assert "argument --backend" in message and "it was never built" in message and "auto" in message


def test_output_folder_is_a_file(capsys, tmp_path):
    (tmp_path / "taken").write_text("mine")
    message = _refused(capsys, tmp_path, "--output-dir", str(tmp_path / "taken"))
    assert "taken is a file" in message
    assert (tmp_path / "taken").read_text() == "mine"


def test_output_folder_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = _refused(capsys, tmp_path, "--output-dir", str(tmp_path / "file" / "run"))
    assert "cannot write to" in message and "Not a directory" in message


def test_earlier_run_is_not_overwritten_silently(capsys, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("log.csv", "notes.txt"):
        (folder / name).write_text("mine")
    message = _refused(capsys, tmp_path, "--output-dir", str(folder))
    assert "not empty" in message and "--overwrite" in message
    assert (folder / "log.csv").read_text() == "mine"
    # Asked for, it replaces the files of a run and no others.
    run_folder.prepare_folder(folder, ("log.csv", "curves.png"), overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_missing_extra(capsys, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name in ("kornia", "sklearn") else find_spec(name)
    )
    message = _refused(capsys, tmp_path)
    assert (
        "kornia, scikit-learn not installed: install the extra distill: pip install '.[distill]' in a clone" in message
    )


def test_importing_the_package_needs_no_extra():
    """A fresh interpreter without the extra imports the pieces, and the command says what is missing."""
    code = """
import sys
for name in ("accelerate", "datasets", "kornia", "matplotlib", "rich", "safetensors", "sklearn", "yaml"):
    sys.modules[name] = None
import vrm_kernels
from vrm_distill import train_one_epoch, validate
import vrm_distill.cli
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_default_folder_is_new(monkeypatch, tmp_path):
    """Without --output-dir the run goes to a folder named after the dataset and the time."""
    from vrm_distill import recipe

    class Stop(BaseException):
        pass

    def run(settings, *_):
        assert settings.output_dir.parent.name == "runs" and settings.output_dir.name.startswith("digits-")
        assert (tmp_path / settings.output_dir).is_dir()
        raise Stop

    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "run", run)
    with pytest.raises(Stop):
        cli.main(["--threads", str(threads)])


# ---- YAML and presets -----------------------------------------------------------------------------------------------


def test_command_line_over_file_over_preset_over_default(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("alpha: 5\nlabel_smoothing: 0.1\nmilestones: [3, 6]\nskip_broken: true\nbaselines: none\n")
    arguments = ["--preset=cifar100_resnet34_mobilenetv2", f"--config={file}", "--beta=7", "--no-skip-broken"]
    given = options.parse(arguments)
    settings = options.settings_of(given)
    assert (settings.teacher, settings.alpha, settings.beta, settings.percentile) == ("resnet34", 5, 7, 30)
    assert settings.milestones == (3, 6) and settings.label_smoothing == 0.1 and not settings.skip_broken
    assert settings.epochs == 200 and settings.seed == 0


def test_the_issues_preset_is_the_issues():
    given = options.parse(["--preset=cifar100_resnet34_mobilenetv2"])
    s = options.settings_of(given)
    assert (s.dataset, s.teacher, s.student) == ("hub:cifar100", "resnet34", "mobilenetv2")
    assert (s.batch_size, s.optimizer, s.lr, s.momentum, s.weight_decay) == (64, "sgd", 0.01, 0.9, 5e-4)
    assert (s.schedule, s.alpha, s.beta, s.percentile) == ("cosine", 800, 400, 30)


@pytest.mark.parametrize("name", options.presets())
def test_every_preset_is_accepted(name):
    if "timm" in (options._PRESETS / f"{name}.yaml").read_text():
        pytest.importorskip("timm")
    options.parse([f"--preset={name}"])


def test_a_written_configuration_is_read_back(tmp_path):
    import yaml

    given = options.parse(["--schedule=step", "--milestones", "2", "4", "--mean", "0.5", "--output-dir", "x"])
    settings = options.settings_of(given)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings.plain()))
    given = options.parse([f"--config={file}"])
    assert not settings.differences(options.settings_of(given).plain())


def test_bare_words_of_yaml(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("precision: no\nresume: true\noverwrite: false\n")
    given = options.parse([f"--config={file}"])
    assert given.precision == "no" and given.resume is True and given.overwrite is False


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("seeds: true", "got 'True'"),
        ("alhpa: 3", "'alhpa', which is no option"),
        ("alpha: lots", "argument --alpha: must be a number, got 'lots'"),
        ("- alpha", "must hold 'option: value' lines"),
        ("alpha: [", "cannot be read"),
        ("config: other.yaml", "which is no option"),
    ],
)
def test_bad_configuration(content, wanted, capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    assert wanted in _refused(capsys, tmp_path, "--config", str(file))


def test_misspelt_source_with_an_image_size(capsys, tmp_path):
    message = _refused(capsys, tmp_path, "--dataset=fodler:photos", "--image-size=64")
    assert "'fodler:photos' names no dataset" in message


def test_checkpoint_is_a_folder_or_names_no_network(capsys, tmp_path):
    from vrm_distill import create_model, save_checkpoint

    name = "conv_4_8_8"
    save_checkpoint(
        tmp_path / "student.safetensors", create_model(name, 1, 10), {"model": name, "in_channels": 1, "classes": 10}
    )
    for arguments in (("eval",), ("--teacher-checkpoint",)):
        message = _refused(capsys, tmp_path, *arguments, str(tmp_path))
        assert f"{tmp_path} is a folder: name the file in it, student.safetensors" in message
    foreign = tmp_path / "foreign.pth"
    torch.save(create_model("resnet8", 1, 10).state_dict(), foreign)
    message = _refused(capsys, tmp_path, "eval", str(foreign))
    assert f"{foreign} names no network: add --network NETWORK" in message


def test_teacher_with_weights_that_are_not_finite(capsys, tmp_path):
    from safetensors.torch import save_file

    from vrm_distill import create_model, save_checkpoint

    file, name = tmp_path / "teacher.safetensors", "conv_32_64_128"
    model = create_model(name, 1, 10)
    weight, parameter = next(iter(model.named_parameters()))
    parameter.data.view(-1)[0] = float("nan")
    metadata = {"model": name, "in_channels": "1", "classes": "10"}
    with pytest.raises(ValueError, match=f"NaN or infinite numbers in {weight}"):
        save_checkpoint(file, model, metadata)
    assert not file.exists()
    save_file(model.state_dict(), file, metadata)
    message = _refused(capsys, tmp_path, "--teacher-checkpoint", str(file), "--teacher", name)
    assert f"{file} has NaN or infinite numbers in {weight}" in message


def test_class_counts_that_differ_are_named(capsys, tmp_path):
    from vrm_distill import create_model, save_checkpoint

    file = tmp_path / "teacher.safetensors"
    name = "conv_32_64_128"
    save_checkpoint(file, create_model(name, 1, 7), {"model": name, "in_channels": 1, "classes": 7})
    message = _refused(capsys, tmp_path, "--teacher-checkpoint", str(file), "--teacher", name)
    assert f"the teacher {name} tells 7 classes apart, the data have 10" in message
    message = _refused(capsys, tmp_path, "--teacher-checkpoint", str(file), "--teacher", "resnet8")
    assert "does not fit the model" in message
