"""Prodigy at the cost of a fused AdamW."""

from importlib.metadata import version

from .install import install, uninstall
from .prodigy import Prodigy
from .release import enable_gradient_release

__version__ = version("prodigy-fused")
__all__ = ["Prodigy", "enable_gradient_release", "install", "uninstall"]
