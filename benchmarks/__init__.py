"""The benchmark suite; run it from the repository's root, it is not installed.

``python -m benchmarks.cpu.run`` measures; ``benchmarks.report.plot``, ``.table`` and ``.summary`` make the pictures and
the tables of README and docs/benchmarks.md from the results; ``.compare`` sets two results side by side.
"""
