"""The comparison: each baseline is its paper's formula, and the command goes on where it was stopped."""

import math

import distill_helpers  # noqa: F401 (skips these tests without the extra)
import pytest
import torch
import torch.nn.functional as F

from benchmarks.methods import losses
from benchmarks.methods import train as compare
from vrm_distill import create_model

B, C, T = 7, 5, 4.0


@pytest.fixture
def logits():
    return torch.randn(B, C, dtype=torch.float64), torch.randn(B, C, dtype=torch.float64), torch.arange(B) % C


def test_kd_is_hintons(logits):
    s, t, y = logits
    p, q = (s / T).softmax(1), (t / T).softmax(1)
    expected = sum(q[i, c] * math.log(q[i, c] / p[i, c]) for i in range(B) for c in range(C)) / B * T**2
    assert float(losses.kd(s, t, y)) == pytest.approx(float(expected), rel=1e-10)


def test_dkd_is_the_papers_and_adds_up_to_kd(logits):
    """Equation 6: KD = TCKD + (1 - p_t of the teacher) NCKD, in each sample."""
    s, t, y = logits
    p, q = (s / T).softmax(1), (t / T).softmax(1)
    tckd, nckd, total = 0.0, 0.0, 0.0
    for i in range(B):
        pt, qt = p[i, y[i]], q[i, y[i]]
        target = qt * math.log(qt / pt) + (1 - qt) * math.log((1 - qt) / (1 - pt))
        others = [c for c in range(C) if c != y[i]]
        rest = sum(q[i, c] / (1 - qt) * math.log(q[i, c] / (1 - qt) / (p[i, c] / (1 - pt))) for c in others)
        tckd, nckd, total = tckd + target / B, nckd + rest / B, total + (target + (1 - qt) * rest) / B
    expected = float(T**2 * (1 * tckd + 8 * nckd))
    assert float(losses.dkd(s, t, y)) == pytest.approx(expected, rel=1e-10)
    assert float(T**2 * total) == pytest.approx(float(losses.kd(s, t, y)), rel=1e-10)


def test_dist_is_the_papers(logits):
    s, t, y = logits
    p, q = (s / T).softmax(1), (t / T).softmax(1)
    rows = sum(1 - torch.corrcoef(torch.stack((p[i], q[i])))[0, 1] for i in range(B)) / B
    columns = sum(1 - torch.corrcoef(torch.stack((p[:, c], q[:, c])))[0, 1] for c in range(C)) / C
    assert float(losses.dist(s, t, y)) == pytest.approx(float(T**2 * (2 * rows + 2 * columns)), rel=1e-9)


def test_rkd_is_the_papers(logits):
    s, t, y = logits

    def distances(x):
        d = torch.tensor([[float((x[i] - x[j]).norm()) for j in range(B)] for i in range(B)], dtype=torch.float64)
        return d / (d.sum() / (B * (B - 1)))

    def angles(x):
        a = torch.zeros(B, B, B, dtype=torch.float64)
        for j in range(B):
            for i in range(B):
                for k in range(B):
                    if i != j and k != j:
                        a[j, i, k] = F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0)
        return a

    expected = 25 * F.smooth_l1_loss(distances(s), distances(t)) + 50 * F.smooth_l1_loss(angles(s), angles(t))
    assert float(losses.rkd(s, t, y)) == pytest.approx(float(expected), rel=1e-8)


def test_terms_of_embeddings_see_what_the_classifiers_see():
    torch.manual_seed(0)
    student, teacher = create_model("conv_3_6_6", 1, 10), create_model("conv_8_16_16", 1, 10)
    student.eval(), teacher.eval()
    real, virtual = torch.randn(2, 6, 1, 8, 8)
    labels = torch.arange(6)
    loss = losses.OnEmbeddings(losses.rkd)(teacher, student, real, virtual, labels)
    expected = 0.0
    for images in (real, virtual):
        e, f = (m.features(images).mean((2, 3)) for m in (student, teacher))
        expected += F.cross_entropy(student(images), labels) + losses.rkd(e, f, labels)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("term", [losses.kd, losses.dkd, losses.dist, losses.rkd])
def test_terms_vanish_at_the_teacher_and_have_gradients(term, logits):
    s, t, y = logits
    assert float(term(t, t, y)) == pytest.approx(0, abs=1e-9)
    assert torch.autograd.gradcheck(lambda x: term(x, t, y), s.requires_grad_())


def test_per_view_adds_both_cross_entropies(logits):
    s, t, y = logits
    loss = losses.PerView(losses.kd, weight=3.0)(s, t, t, s, y)
    expected = F.cross_entropy(s, y) + F.cross_entropy(t, y) + 3 * (losses.kd(s, t, y) + losses.kd(t, s, y))
    torch.testing.assert_close(loss, expected)


def test_local_batch_is_the_mean_over_its_parts():
    task = compare.TASKS["digits"]
    tensors = [torch.randn(16, C) for _ in range(4)] + [torch.arange(16) % C]
    whole = compare.METHODS["vrm"](task)
    parts = [whole(*(x[i : i + 4] for x in tensors)) for i in range(0, 16, 4)]
    torch.testing.assert_close(compare.ABLATIONS["vrm local batch"](task)(*tensors), torch.stack(parts).mean())


SMALL = ["--train-images=100", "--epochs=1", "--teacher-epochs=1", "--seeds=2", "--batch-size=50"]


def test_command_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    arguments = [*SMALL, "--output-dir", str(tmp_path)]
    assert compare.main([*arguments, "--methods", "ce", "kd", "--ablate"]) == 0
    path = tmp_path / "compare.csv"
    first = compare.read(path)
    assert [(row["method"], row["seed"]) for row in first] == [("ce", "0"), ("ce", "1"), ("kd", "0"), ("kd", "1")]
    assert not (tmp_path / "compare-batch.png").exists()
    weights = (tmp_path / "teacher-digits.safetensors").read_bytes()
    monkeypatch.setattr(compare, "BATCH_SIZES", (25,))
    assert compare.main([*arguments, "--ablate", "digits"]) == 0
    rows = compare.read(path)
    assert rows[:4] == first and (tmp_path / "teacher-digits.safetensors").read_bytes() == weights
    methods = len(compare.METHODS) + len(compare.ABLATIONS)
    assert len(rows) == 2 * (methods + 3) and all(0 <= float(row["last"]) <= float(row["best"]) <= 1 for row in rows)
    for name in ("compare.png", "compare-batch.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    before = path.read_bytes()
    capsys.readouterr()
    assert compare.main([*arguments, "--ablate", "digits"]) == 0
    assert path.read_bytes() == before
    output = capsys.readouterr().out
    assert "| `vrm no pruning` | 2 |" in output and "\n| 25 | " in output

    # A kill in the middle of the last row: that student is trained again, and to the same accuracy.
    path.write_bytes(before[:-30])
    assert compare.main([*arguments, "--ablate", "digits"]) == 0
    again = compare.read(path)
    assert again[:-1] == rows[:-1] and again[-1]["last"] == rows[-1]["last"]

    # Students of another length or another teacher are not put beside these.
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--epochs=2"])
    assert "trained for 1 epochs" in capsys.readouterr().err
    assert compare.main([*arguments, "--teacher-epochs=2", "--seeds=3", "--methods", "ce"]) == 1
    assert "another --output-dir" in capsys.readouterr().err
    assert compare.read(path) == again


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--seeds", "0"], "--seeds: must be at least 1"),
        (["--batch-size", "1"], "--batch-size: must be at least 4"),
        (["--lr", "nan"], "--lr: must be > 0"),
        (["--epochs", "-1"], "--epochs: must be at least 1"),
        (["--threads", "0"], "--threads: must be at least 1"),
        (["--device", "abacus"], "--device: invalid choice"),
        (["--datasets", "imagenet"], "--datasets: invalid choice"),
        (["--methods", "magic"], "--methods: invalid choice"),
        (["--datasets", "digits", "omniglot", "--omniglot", "nowhere"], "--omniglot: omniglot:nowhere: nowhere does"),
        (["--datasets", "digits", "fashion", "--fashion", "nowhere"], "--fashion: idx:nowhere: nowhere does not"),
        (["--train-images", "5"], "--train-images: digits has 20 to 900"),
        (["--train-images", "100"], "--train-images: batches of 256"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(arguments, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare._Comparison, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit) as status:
        compare.main(["--output-dir", str(tmp_path), *arguments])
    assert status.value.code == 2
    message = capsys.readouterr().err.split("error: ")[1]
    assert f"argument {wanted}" in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


HEADER = ",".join(compare.FIELDS)
LINE = "digits,ce,0,64,30,0.9,0.95,0.99,6.1,0.1.0,2.13.0"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"a,b\n", "its columns are a, b"),
        (b"\xff\xfe\n", "cannot be read"),
        (f"{HEADER}\n{LINE}\ndigits,ce\n".encode(), "line 3: 2 columns of 11"),
        (f"{HEADER}\n{LINE.replace('0.95', 'high')}\n".encode(), "line 2: could not convert"),
    ],
)
def test_a_csv_that_cannot_be_read_is_refused(content, wanted, tmp_path, capsys):
    (tmp_path / "compare.csv").write_bytes(content)
    with pytest.raises(SystemExit) as status:
        compare.main(["--output-dir", str(tmp_path)])
    assert status.value.code == 2
    message = capsys.readouterr().err.split("error: ")[1]
    assert wanted in message and message.count("\n") == 1
    assert (tmp_path / "compare.csv").read_bytes() == content


def test_a_row_that_a_kill_cut_off_is_dropped(tmp_path):
    """Wherever the file ends, reading finds the whole rows, and the next row stands on a line of its own."""
    path = tmp_path / "compare.csv"
    rows = [dict(zip(compare.FIELDS, LINE.replace("ce,0", f"ce,{seed}").split(","), strict=True)) for seed in range(3)]
    for row in rows[:2]:
        compare.append(path, row)
    whole = path.read_bytes()
    assert compare.read(path) == rows[:2]
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = rows[: max(0, sum(end <= length for end in ends) - 1)]
        assert compare.read(path) == kept
        compare.append(path, rows[2])
        assert compare.read(path) == [*kept, rows[2]]


def test_divergence_is_a_sentence(tmp_path, capsys):
    arguments = [*SMALL, "--methods", "ce", "--ablate", "--output-dir", str(tmp_path)]
    assert compare.main([*arguments, "--lr", "1e30"]) == 1
    errors = capsys.readouterr().err
    assert "digits, ce, batch 50, seed 0: " in errors and "became NaN or infinite" in errors and "--lr" in errors
    assert compare.read(tmp_path / "compare.csv") == []
