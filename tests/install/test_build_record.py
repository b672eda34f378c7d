"""What is said of an extension that is outdated, missing, shadowed or beside another torch."""

import json

import pytest

from vrm_kernels.backends import build_record


@pytest.fixture
def package(monkeypatch, tmp_path):
    folder = tmp_path / "vrm_kernels"
    folder.mkdir()
    monkeypatch.setattr(build_record, "PACKAGE", folder)
    return folder


@pytest.fixture
def clone(package):
    """The same in a source tree."""
    csrc = package.parent / "csrc"
    for name in ("edge.h", "cpu/ops.cpp", "cuda/ops.cpp"):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text(name)
    (package.parent / "setup.py").write_text("")
    return package


def write(package, **of_cpp):
    record = {"reason": "", "torch": "2.13.0", "sources": "", **of_cpp}
    (package / build_record.NAME).write_text(json.dumps({"cpp": record, "cuda": record}))


def test_a_library_of_other_sources_is_refused(clone):
    csrc = clone.parent / "csrc"
    built_from = build_record.fingerprint(csrc, "cpp")
    assert build_record.why_outdated("cpp", built_from) == ""
    (csrc / "cuda" / "ops.cpp").write_text("changed")  # the other backend's
    assert build_record.why_outdated("cpp", built_from) == ""
    for name in ("edge.h", "cpu/ops.cpp"):
        (csrc / name).write_text("changed " + name)
        said = build_record.why_outdated("cpp", built_from)
        assert "built from other sources than those in" in said and "run 'make build'" in said
        (csrc / name).write_text(name)
    (csrc / "cpu" / "new.h").write_text("")
    assert build_record.why_outdated("cpp", built_from)


def test_an_installed_library_needs_no_sources(package):
    assert build_record.why_outdated("cpp", "anything") == ""


def test_a_source_tree_that_was_never_built(clone):
    said = build_record.why_left_out("cpp")
    assert f"Python uses the source tree {clone.parent}" in said and "start Python elsewhere" in said


def test_a_package_without_a_record(package):
    assert "install it again" in build_record.why_left_out("cpp")


def test_the_recorded_reason(package):
    write(package, reason="no compiler: c++ not found")
    assert build_record.why_left_out("cpp") == "no compiler: c++ not found"


def test_another_torch_is_named_instead_of_a_mangled_symbol(package):
    write(package)
    assert build_record.why_left_out("cpp") == ""
    error = ImportError("undefined symbol: _ZN3c10")
    said = build_record.why_it_does_not_load("cpp", "2.10.0", error)
    assert "built beside torch 2.13.0 and does not load beside torch 2.10.0: reinstall" in said and "_ZN" not in said
    assert "_ZN3c10" in build_record.why_it_does_not_load("cpp", "2.13.0", error)
