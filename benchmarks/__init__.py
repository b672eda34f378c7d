"""The benchmark suite: ``python -m benchmarks.cpu.run`` measures, ``.plot`` draws, ``.table`` writes the
README's tables, ``.compare`` sets two results side by side. Run from the repository's root; not installed.
"""
