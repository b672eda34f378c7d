"""A small detector from a large one: alone, with KD on logits, and with relation matching.

    python examples/detection/distil.py [--output FOLDER]

The logits of some locations of a batch are the samples of the relation graphs: a budget, since their cost grows with
its square. KD is taken of the same locations, so that the methods differ in nothing but that term. The weight of either
is chosen from four, on other pictures than those that the table is of. Needs pycocotools and scikit-learn.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detector import Detector, detection_loss, precision
from scenes import BACKGROUND, IGNORED, Scenes, make_scenes, views
from scipy.stats import t
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vrm_distill.engine import hinton_divergence
from vrm_kernels import VRMLoss
from vrm_kernels.dense import sample_locations

TEACHER_WIDTH, STUDENT_WIDTH = 24, 8
LR, BATCH = 0.01, 16
BUDGET = 256  # locations of a batch of 16 * 144
WEIGHTS = {"alone": (0.0,), "kd": (0.1, 0.3, 1.0, 3.0), "vrm": (0.25, 1.0, 4.0, 16.0)}
TEACHER_SEED = 1000  # of the students that the weights are chosen by, too
# term(student real, student virtual, teacher real, teacher virtual), logits [N, 11] each.
Term = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def term_of(method: str, weight: float) -> Term | None:
    if method == "vrm":
        relations = VRMLoss(weight, weight / 2, ce_loss_on_real=False, ce_loss_on_virtual=False)
        return lambda *logits: relations(*logits, None)

    def kd(student_real: Tensor, student_virtual: Tensor, teacher_real: Tensor, teacher_virtual: Tensor) -> Tensor:
        pairs = ((student_real, teacher_real), (student_virtual, teacher_virtual))
        return weight * sum(hinton_divergence(*pair, temperature=2.0) for pair in pairs)

    return kd if method == "kd" else None


def train(
    width: int, scenes: Scenes, epochs: int, seed: int, teacher: nn.Module | None = None, term: Term | None = None
) -> Detector:
    """A detector: its loss on both views and, with a teacher, ``term`` of the logits of some locations."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Detector(width)
    steps = epochs * (len(scenes.images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        if step % (len(scenes.images) // BATCH) == 0:
            order = torch.randperm(len(scenes.images), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        real, virtual = views(scenes.images[chosen], generator)
        images, classes = torch.cat((real, virtual)), scenes.classes[chosen]
        logits, distances = (x.chunk(2) for x in model(images))
        loss = sum(
            detection_loss(*said, classes, scenes.distances[chosen]) for said in zip(logits, distances, strict=True)
        )
        if term is not None:
            with torch.no_grad():
                teacher_logits = teacher(images)[0].chunk(2)
            # Digits, and a tenth of the background, of which there is so much.
            left_out = (classes == BACKGROUND) & (torch.rand(classes.shape, generator=generator) > 0.1)
            rows, _ = sample_locations(
                (*logits, *teacher_logits), classes.masked_fill(left_out, IGNORED), BUDGET, seed=step,
                ignore_index=IGNORED,
            )  # fmt: skip
            loss = loss + term(*rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=800, help="to train on (default: %(default)s)")
    parser.add_argument("--judged", type=int, default=400, help="to choose by, and to judge by (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=25, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/detection"), help="default: %(default)s")
    options = parser.parse_args(argv)
    scenes = parts(options.pictures, options.judged)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "detection.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["part", "method", "weight", "seed", "map", "ap50", "seconds"])

        def trained(part: str, method: str, weight: float, seed: int, width: int, teacher: Detector | None = None):
            start = time.process_time()
            model = train(width, scenes["training"], options.epochs, seed, teacher, term_of(method, weight))
            seconds = time.process_time() - start
            worth = precision(model, scenes[part])
            table.writerow([part, method, f"{weight:g}", seed, *(f"{x:.4f}" for x in worth), f"{seconds:.1f}"])
            file.flush()
            print(f"{part}: {method} {weight:g}, seed {seed}: mAP {worth[0]:.1%}, {seconds:.0f} s", flush=True)
            return model, worth

        teacher, worth = trained("test", "teacher", 0.0, TEACHER_SEED, TEACHER_WIDTH)
        found = {"teacher": [worth]}
        for method, weights in WEIGHTS.items():
            tried = {
                weight: trained("validation", method, weight, TEACHER_SEED, STUDENT_WIDTH, teacher)[1]
                for weight in weights
            }
            chosen = max(tried, key=tried.get)
            found[method] = [
                trained("test", method, chosen, seed, STUDENT_WIDTH, teacher)[1] for seed in range(options.seeds)
            ]
    text = summary(found)
    (options.output / "detection.md").write_text(text + "\n")
    print(text)


def parts(pictures: int, judged: int) -> dict[str, Scenes]:
    """Pictures to train on, to choose by, and to judge by; the digits of one part are in no picture of another."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    split = {"training": (order[:1000], pictures), "validation": (order[1000:1300], judged)}
    split["test"] = order[1300:], judged
    return {name: make_scenes(images[x], labels[x], n, seed) for seed, (name, (x, n)) in enumerate(split.items())}


def summary(found: dict[str, list[tuple[float, float]]]) -> str:
    """A table in Markdown of ``(mAP, AP50)`` by method and seed; differences are paired by seed."""
    lines = ["| detector | mAP | AP50 | mAP above `alone`, points |", "|---|---:|---:|---:|"]
    for method, values in found.items():
        cells = [spread([100 * x for x in column]) for column in zip(*values, strict=True)]
        gains = [100 * (value[0] - alone[0]) for value, alone in zip(values, found["alone"], strict=False)]
        lines.append(f"| `{method}` | {' | '.join(cells)} | {interval(gains) if method in ('kd', 'vrm') else ''} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if values[1:] else "") + " %"


def interval(values: list[float]) -> str:
    """The mean, and between what it is with 95 % confidence (Student's t)."""
    mean = statistics.fmean(values)
    if not values[1:]:
        return f"{mean:+.1f}"
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


if __name__ == "__main__":
    main()
