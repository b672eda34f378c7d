"""Checkpoints come back as they were, are written whole or not at all, and say what is wrong with a file."""

import os

import pytest
import torch

from vrm_distill import MODELS, create_model, load_checkpoint, save_checkpoint

pytest.importorskip("safetensors")


def _metadata(name):
    return {"model": name, "in_channels": 1, "classes": 10}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    model = create_model(name, 1, 10)
    model(torch.randn(4, 1, 8, 8))  # moves the batch norms' running statistics
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, _metadata(name) | {"seed": 3})
    loaded, metadata = load_checkpoint(path)
    assert metadata["seed"] == "3" and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, loaded.state_dict()[key]) for key, x in model.state_dict().items())
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(loaded(images), model.eval()(images))
    assert os.listdir(tmp_path) == [path.name]


def test_interrupted_write_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, create_model("conv_4_8_8", 1, 10), _metadata("conv_4_8_8"))
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, create_model("conv_4_8_8", 1, 10), _metadata("conv_4_8_8"))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_bad_files_and_names_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="not a safetensors checkpoint"):
        load_checkpoint(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="lacks model, in_channels, classes"):
        load_checkpoint(path)
    save_file({"weight": torch.zeros(1)}, path, {key: str(value) for key, value in _metadata("resnet99").items()})
    with pytest.raises(ValueError, match="unknown model 'resnet99'"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="missing classes"):
        save_checkpoint(path, create_model("conv_4_8_8", 1, 10), {"model": "conv_4_8_8", "in_channels": 1})
