"""What ``vrm-distill export`` writes gives the student's logits elsewhere; class names travel with the student."""

import json

import distill_helpers  # noqa: F401 (skips these tests without the extra)
import pytest
import torch
from safetensors import safe_open

from vrm_distill import create_model, save_checkpoint
from vrm_distill.cli import main


@pytest.fixture
def student(tmp_path):
    torch.manual_seed(0)
    model = create_model("conv_4_8_8", 1, 10)
    model(torch.randn(32, 1, 8, 8))  # moves the batch norms' running statistics
    metadata = {"model": "conv_4_8_8", "in_channels": 1, "classes": 10, "size": "8 8", "mean": "0.3", "std": "0.4"}
    names = json.dumps([f"digit {i}" for i in range(10)])
    save_checkpoint(tmp_path / "student.safetensors", model, {**metadata, "class_names": names})
    return model.eval(), tmp_path / "student.safetensors"


def test_onnx_gives_the_same_logits(student, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = student
    assert main(["export", str(path), "--to", str(tmp_path / "s.onnx")]) == 0
    assert "onnxruntime gives torch's logits to" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    images = torch.rand(7, 1, 8, 8)
    found = session.run(None, {"images": images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model((images - 0.3) / 0.4), rtol=1e-4, atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"])[3] == "digit 3"


def test_weights_alone(student, tmp_path, capsys):
    model, path = student
    for suffix in ("safetensors", "pt"):
        target = tmp_path / f"w.{suffix}"
        assert main(["export", str(path), "--to", str(target)]) == 0
        if suffix == "pt":
            found = torch.load(target, weights_only=True)
        else:
            with safe_open(target, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert all(torch.equal(x, found[name]) for name, x in model.state_dict().items())
        with pytest.raises(SystemExit):
            main(["export", str(path), "--to", str(target)])
        assert f"{target} exists" in capsys.readouterr().err
        assert main(["export", str(path), "--to", str(target), "--overwrite"]) == 0


def test_bad_targets_are_refused(student, tmp_path, capsys):
    for target, wanted in (("x.png", "must end in .onnx"), (str(tmp_path / "no" / "x.pt"), "there is no folder")):
        with pytest.raises(SystemExit):
            main(["export", str(student[1]), "--to", target])
        assert wanted in capsys.readouterr().err
