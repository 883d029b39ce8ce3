"""Prodigy's step in Triton. Importing this package does not import triton; its module ``kernels`` does.

It is installed as ``prodigy_fused.triton_kernels``. The name ``triton_kernels`` is another package's, on PyPI: where
this folder's parent is on the path (a source tree, an editable install), it must not pass for that one.
"""

if __name__ == "triton_kernels":
    raise ModuleNotFoundError(
        "this folder is prodigy_fused.triton_kernels, not the package triton_kernels of PyPI: install that one, and "
        "run outside of the source tree of prodigy-fused",
        name=__name__,
    )
