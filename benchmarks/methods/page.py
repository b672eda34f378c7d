"""The comparison of methods in docs/compare.md: ``python -m benchmarks.methods.page [CSV]``, nothing is trained.

Draws the picture beside the CSV and rewrites what stands between ``<!-- compare:begin -->`` and
``<!-- compare:end -->``, and nothing else.
"""

import argparse
import os
from pathlib import Path

from benchmarks.harness import environment
from benchmarks.methods import cost, report, results, train
from benchmarks.report.table import rewrite

BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods.page", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="?", default=environment.ROOT / train.RESULTS / train.CSV)
    parser.add_argument("--page", type=Path, default=environment.ROOT / "docs" / "compare.md")
    args = parser.parse_args(arguments)
    source, folder = args.csv.resolve(), args.page.resolve().parent

    def link(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    try:
        rows = results.read(source)
        if not rows:
            raise ValueError(f"{source} holds no students yet: make compare trains them")
        picture = source.parent / report.PICTURE
        shown = [f"![test accuracy by method]({link(picture)})"] if report.draw(rows, picture) else []
        text = report.render(rows, cost.read(source.parent / cost.CSV))
        rewrite(args.page, "\n\n".join([*shown, text, f"Every student: [{source.name}]({link(source)})."]), BEGIN, END)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.page}: {len(rows)} students from {source}")


if __name__ == "__main__":
    main()
