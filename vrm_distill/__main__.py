"""``python -m vrm_distill`` is ``vrm-distill``."""

import sys

from vrm_distill.cli import main

sys.exit(main())
