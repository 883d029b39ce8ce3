"""Steps in inference mode, as those of methods that make gradients without autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def outside_inference_mode(function: Callable[..., None]) -> Callable[..., None]:
    """Returns a function that leaves inference mode: outside of it, nobody could change what was created in it."""

    @wraps(function)
    def outside(*args: Any, **named: Any) -> None:
        if not torch.is_inference_mode_enabled():
            function(*args, **named)
            return
        with torch.inference_mode(False), torch.no_grad():
            function(*args, **named)

    return outside


def writable(p: Tensor) -> Tensor:
    """Returns a parameter, or its memory if it was created in inference mode, outside of which it cannot be changed."""
    if not p.is_inference():
        return p
    return p.new_empty(0).set_(p.untyped_storage(), p.storage_offset(), p.size(), p.stride())
