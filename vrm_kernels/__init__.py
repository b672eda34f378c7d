"""Virtual Relation Matching (arXiv 2502.20760) without a pairwise tensor.

The public names; importing the package needs torch alone, and imports no compiled module.
"""

from vrm_kernels import backends, functional
from vrm_kernels.data import DualViewDataset
from vrm_kernels.loss import VRMLoss

__version__ = "0.2.0"
__all__ = ["DualViewDataset", "VRMLoss", "__version__", "backends", "functional"]
