"""Prodigy at the cost of a fused AdamW."""

from importlib.metadata import version

from .install import install, uninstall
from .prodigy import Prodigy

__version__ = version("prodigy-fused")
__all__ = ["Prodigy", "install", "uninstall"]
