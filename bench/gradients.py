"""The gradients of a race: what every racer makes of the same random numbers."""

from __future__ import annotations

from torch import Tensor


def drawn(gradient: Tensor, k: int) -> Tensor:
    """Returns the k-th of four gradients that one random tensor makes: new tensors, which cost no random numbers.

    No step on one of them finds a parameter moved along it by another, which would move d.
    """
    new = gradient.flatten().flip(0).view_as(gradient) if k % 2 else gradient.clone()
    return new.neg_() if k >= 2 else new


def normal(gradient: Tensor, first: bool) -> Tensor:
    """Leaves the gradients as they were drawn. On fresh ones d rests, but by chance, where elements are few."""
    return gradient


def positive(gradient: Tensor, first: bool) -> Tensor:
    """Makes gradients whose steps all go one way, so that each of them moves d."""
    return gradient.abs_()


def zero(gradient: Tensor, first: bool) -> Tensor:
    """Makes gradients that are zero but for one element of the first: without any, no step would be taken."""
    gradient.zero_().view(-1)[:1] = float(first)
    return gradient
