"""prodigy_fused in the place of prodigyopt.prodigy."""

from prodigy_fused import Prodigy

__all__ = ["Prodigy"]
