"""Prodigy's step in Triton. Importing this package does not import triton; its other modules do.

It is installed as ``prodigy_fused.triton_kernels``. On PyPI, the name ``triton_kernels`` belongs to another package,
for which this folder must not be taken where its parent is on the path: in a source tree or an editable install.
"""

if __name__ == "triton_kernels":
    raise ModuleNotFoundError(
        "this folder is prodigy_fused.triton_kernels, not the package triton_kernels of PyPI: install that one, and "
        "run outside of the source tree of prodigy-fused",
        name=__name__,
    )
