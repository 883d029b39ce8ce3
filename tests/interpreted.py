"""The backend ``triton`` where there is no GPU: its kernels run by Triton's interpreter, on CPU tensors."""

import functools
import os

import numpy as np
import torch

from prodigy_fused import backends
from prodigy_fused.backends import native
from prodigy_fused.backends import triton as backend

# The emulation's chunk. Blocks are large, because the interpreter's time is one of operations, not of elements.
SIZES = backend.Sizes(chunk=1 << 10, block=1 << 9, resident=1, lanes=4, warps=1)
PROGRAMS = 2


class Interpreted:
    """The Triton backend, which on request takes CPU tensors as well."""

    COMPILED = ONE_PASS = READS_DEVICE = True
    missing = staticmethod(backend.missing)
    make_plan = backend.TritonPlan

    def unsupported(self, p, group):
        if p.device.type != "cpu" or group["backend"] != "triton":
            return backend.unsupported(p, group)
        return native.unfit(p, group) or _problem(p.device)


@functools.cache
def _problem(device):
    try:
        backend.try_out(device)
    except Exception as error:
        return f"the interpreter cannot run the kernels: {error}"
    return None


def register():
    """Lets ``backend="triton"`` take CPU tensors. To be called before triton is imported."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from triton.runtime import interpreter
    except ImportError:
        return  # the tests of the backend are skipped, or fail if it is required
    backends.register("triton", Interpreted())
    backend.sizes, backend.PROGRAMS_PER_MULTIPROCESSOR = lambda key: SIZES, PROGRAMS
    backend._multiprocessors = lambda device: 1
    # The lesser of a number and NaN is the number, as on a GPU.
    interpreter.InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    _hasten(interpreter)


def _hasten(interpreter):
    """Without what takes two thirds of the interpreter's time, and says nothing about kernels."""

    # A launch prepares the language for our kernels; once is enough, not again for every function they call. For each
    # of Triton's own it has to be prepared, once a launch.
    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("triton.") and self.fn not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    # NumPy warns of what IEEE arithmetic is for: x / 0, inf - inf.
    def launch(self, *args, **kwargs):
        prepared.clear()
        with np.errstate(all="ignore"):
            return original(self, *args, **kwargs)

    prepared = set()
    original = interpreter.GridExecutor.__call__
    if getattr(original, "hastened", False):
        return
    launch.hastened = True
    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)


def _with_index(patch):
    """Before 3.7 Triton makes a number of an array of one element as NumPy 2.4 no longer does."""

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    return patched


def _remembered(dtype_of):
    """Of scalar types only: pointers and blocks cannot be looked up by their content."""
    remembered = functools.cache(dtype_of)
    return lambda t: dtype_of(t) if t.is_ptr() or t.is_block() else remembered(t)
