"""Prodigy's step in Triton: the modules of the folder triton_kernels/ at the top of the source tree.

A wheel has them here, next to this file: setup.py copies them. In a source tree or an editable install they are only in
that folder, which is then the path of this package. (Not by a symbolic link: Git for Windows makes a text file of it.)
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels.py").exists():
    __path__ = [str(_HERE.parents[1] / "triton_kernels")]
