"""``python -m vrm_kernels.distill`` is ``vrm-distill``."""

import sys

from vrm_kernels.distill.cli import main

sys.exit(main())
