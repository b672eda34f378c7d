"""Builds the extensions where it can: see tools/build_extensions.py. All else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import build_extensions

setup(**build_extensions.settings())
