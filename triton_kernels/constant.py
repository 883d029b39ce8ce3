"""`constexpr_function`: makes of a function of constants one that runs when the kernel that calls it is compiled."""

__all__ = ["constexpr_function"]

try:
    from triton import constexpr_function
except ImportError:  # Triton 3.4
    from triton.language.core import constexpr_function
