"""The paper's methods for convex problems, what they are compared with, and what came before: optimizers of torch.

Each is a ``torch.optim.Optimizer`` with ``.d``, the estimate of the distance to a solution, and ``.average()``, the
iterate that its theorem is about. They are for the theory and the experiments: plain operations, float64, a wait for
the device in every step. :class:`prodigy_fused.Prodigy` is the paper's Algorithm 4, and the one for networks.
"""

from .adam import DAdaptAdam
from .distance import AdagradNorm, DoG, DoWG, LDoG, NormalizedSubgradient, Polyak
from .prodigy import DAdaptDA, DAdaptGD, DAdaptReset, ProdigyCoordinate, ProdigyDA, ProdigyGD

__all__ = [
    "AdagradNorm",
    "DAdaptAdam",
    "DAdaptDA",
    "DAdaptGD",
    "DAdaptReset",
    "DoG",
    "DoWG",
    "LDoG",
    "NormalizedSubgradient",
    "Polyak",
    "ProdigyCoordinate",
    "ProdigyDA",
    "ProdigyGD",
]
