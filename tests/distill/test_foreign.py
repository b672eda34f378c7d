"""Checkpoints of other code: wrapped names, things beside the weights, and files that would execute something."""

import argparse
import os
import pathlib

import distill_helpers  # noqa: F401 (skips these tests without the extra)
import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vrm_distill import foreign
from vrm_distill.checkpoint import read_weights


def _network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 4))


def _loads(path):
    """Whether the network of the file is the one of ``_weights``; and what is said of it."""
    model = _network()
    notes = foreign.fit(model, read_weights(path)[0], path)
    return all(torch.equal(x, _weights()[name]) for name, x in model.state_dict().items()), notes


def _weights():
    torch.manual_seed(7)
    return _network().state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_wrapped_names(prefix, suffix, tmp_path):
    path, state = tmp_path / f"teacher{suffix}", {prefix + name: x for name, x in _weights().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert _loads(path) == (True, [])


def test_part_of_a_lightning_module_and_a_running_mean(tmp_path):
    path = tmp_path / "last.ckpt"
    others = {"criterion.weight": torch.ones(3), "n_averaged": torch.tensor(5)}
    state = {**{f"net.module.{name}": x for name, x in _weights().items()}, **others}
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": argparse.Namespace(lr=0.1)}, path)
    same, notes = _loads(path)
    assert same and notes == [f"{path}: left out criterion.weight, n_averaged, which are not of the network"]


def test_what_is_missing_and_left_over_is_listed(tmp_path):
    state = _weights()
    state["extra.weight"] = state.pop("3.bias")
    state["0.weight"] = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError) as error:
        foreign.fit(_network(), state, "t.pth")
    assert "missing 3.bias" in str(error.value) and "left over" in str(error.value)
    assert "extra.weight" in str(error.value)
    state = _weights() | {"0.weight": torch.zeros(1, 1, 1, 1)}
    with pytest.raises(ValueError, match=r"0.weight is \[1, 1, 1, 1\], the network's \[2, 1, 3, 3\]"):
        foreign.fit(_network(), state, "t.pth")
    # Two networks in one file: which is meant is not guessed.
    both = {f"{part}.{name}": x for part in ("student", "teacher") for name, x in _weights().items()}
    with pytest.raises(ValueError, match="missing 0.bias"):
        foreign.fit(_network(), both, "t.pth")


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "model_state_dict", "state_dict_ema", "model_ema"])
def test_what_research_code_saves_beside_the_weights(key, tmp_path):
    path = tmp_path / "best.pth.tar"
    beside = {
        "best_acc": numpy.float64(0.7),
        "history": numpy.arange(3),
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x")),
        "classes": {"a", "b"},
    }
    torch.save({key: _weights(), **beside}, path)
    assert _loads(path) == (True, [])


def test_a_running_mean_comes_before_the_weights(tmp_path):
    path = tmp_path / "both.pth"
    torch.save({"state_dict": {name: x + 1 for name, x in _weights().items()}, "state_dict_ema": _weights()}, path)
    assert _loads(path) == (True, [])


class _Executes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["model", "args"])
def test_what_would_execute_is_refused_and_does_not(where, tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": _weights(), where: _Executes(tmp_path / "executed")}, path)
    with pytest.raises(ValueError, match="would have to run code"):
        read_weights(path)
    assert not (tmp_path / "executed").exists()


def test_text_named_as_a_checkpoint(tmp_path):
    for content in (b"weights: 3\n", b"", b"\x80\x02."):
        (tmp_path / "t.pt").write_bytes(content)
        with pytest.raises(ValueError, match="t.pt cannot be read as plain tensors"):
            read_weights(tmp_path / "t.pt")
