"""The comparison of methods in docs/compare.md: ``python -m benchmarks.methods.page [CSV]``, nothing is trained.

Draws the pictures beside the CSV and rewrites what stands between ``<!-- compare:begin -->`` and
``<!-- compare:end -->``, and nothing else.
"""

import argparse
import os
from pathlib import Path

from benchmarks.harness import environment
from benchmarks.methods import report as compare_report
from benchmarks.methods import train as compare
from benchmarks.report.table import rewrite

BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"
PICTURES = {
    compare_report.METHODS_PICTURE: "accuracy by method",
    compare_report.BATCH_PICTURE: "accuracy against the batch size",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods.page", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="?", default=environment.ROOT / compare.RESULTS / compare.CSV)
    parser.add_argument("--page", type=Path, default=environment.ROOT / "docs" / "compare.md")
    args = parser.parse_args(arguments)
    source, folder = args.csv.resolve(), args.page.resolve().parent

    def link(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    try:
        rows = compare.read(source)
        if not rows:
            raise ValueError(f"{source} holds no students yet: make compare trains them")
        pictures = compare_report.draw(rows, source.parent)
        shown = [f"![{PICTURES[path.name]}]({link(path)})" for path in pictures]
        text = "\n\n".join([*shown, compare_report.render(rows), f"Every student: [{source.name}]({link(source)})."])
        rewrite(args.page, text, BEGIN, END)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.page}: {len(rows)} students from {source}")


if __name__ == "__main__":
    main()
