"""Installation: triton_kernels/ becomes ``prodigy_fused.triton_kernels``, next to another package of the same name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, python
from toolbox import device_of

needs_triton = pytest.mark.skipif(device_of("triton") is None, reason="no Triton here")

SOURCES = (
    "prodigy_fused",
    "triton_kernels",
    "csrc",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
IMPORTED = """
import prodigy_fused, prodigy_fused.triton_kernels.kernels as ours, triton_kernels
print(ours.__file__, triton_kernels.OTHER, sep="\\n")
prodigy_fused.install()
import prodigyopt
from importlib.metadata import distributions
from prodigy_fused.install import METADATA
print(prodigyopt.__file__, next(iter(distributions(path=[METADATA]))).version, sep="\\n")
"""


@pytest.fixture
def tree(tmp_path):
    """The sources without anything built, and next to them what another package of that name would install."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, tmp_path / "tree" / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / "tree" / name)
    (tmp_path / "other" / "triton_kernels").mkdir(parents=True)
    (tmp_path / "other" / "triton_kernels" / "__init__.py").write_text("OTHER = 'the other package'\n")
    return tmp_path / "tree"


def test_no_source_is_a_symbolic_link():
    """Git for Windows would check it out as a text file."""
    assert [path for name in SOURCES for path in (ROOT / name).rglob("*") if path.is_symlink()] == []


def packages():
    """Returns where everything is installed but this package, of which another source tree may be on the path."""
    others = [entry for entry in sys.path if entry and not (Path(entry) / "triton_kernels" / "rule.py").exists()]
    return [entry for entry in others if "site-packages" in entry or not Path(entry).is_relative_to(ROOT)]


def build(tree, *command):
    """Without C++, whose compiler here fails: it would take a minute."""
    environment = {**os.environ, "CXX": shutil.which("false"), "PRODIGY_FUSED_CUDA": "0"}
    done = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def check_import(interpreter, path, tree):
    """Checks, outside of the source tree, that the package's own kernels and the other package have each their name."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [interpreter, "-c", IMPORTED]
    done = subprocess.run(command, cwd=tree.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, other, stand_in, version = done.stdout.splitlines()
    assert Path(ours).is_relative_to(tree.parent) and ours.endswith("triton_kernels/kernels.py")
    assert other == "the other package"
    assert Path(stand_in).is_relative_to(tree.parent) and version == "1.1.2+prodigy.fused"


@needs_triton
@pytest.mark.parametrize(
    ("through_sdist", "order"),
    [pytest.param(False, 1, marks=pytest.mark.slow), (True, -1)],
    ids=["ours first", "sdist, ours last"],
)
def test_wheel(tree, through_sdist, order):
    other = tree.parent / "other"
    if through_sdist:
        build(tree, "setup.py", "-q", "sdist", "-d", "dist")
        (archive,) = (tree / "dist").glob("*.tar.gz")
        shutil.unpack_archive(archive, tree.parent / "unpacked", filter="data")
        (tree,) = (tree.parent / "unpacked").iterdir()
    build(tree, "setup.py", "-q", "bdist_wheel", "-d", "dist")
    (wheel,) = (tree / "dist").glob("*.whl")
    installed = tree.parent / "installed"
    shutil.unpack_archive(wheel, installed, "zip")
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"prodigy_fused"}
    check_import(sys.executable, [*[installed, other][::order], *packages()], tree)


@needs_triton
def test_editable_install(tree):
    folder = tree.parent / "venv"
    build(tree, "-m", "venv", "--without-pip", folder)
    interpreter = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join([*packages(), str(tree.parent / "other")]))
    pip = ["-m", "pip", "--python", interpreter, "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."]
    build(tree, *pip)
    check_import(interpreter, [], tree)


def test_the_source_tree_does_not_pass_for_the_other_package():
    code = "import importlib\ntry:\n import triton_kernels\nexcept ModuleNotFoundError as e: print(e)"
    assert "triton_kernels of PyPI" in python(code)


def test_neither_the_import_nor_a_step_on_the_cpu_imports_triton():
    code = """
import sys, torch, prodigy_fused
print("triton" in sys.modules)
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
prodigy_fused.Prodigy([p]).step()  # in which torch imports triton for purposes of its own
print("prodigy_fused.triton_kernels.kernels" in sys.modules)
"""
    assert python(code).split() == ["False", "False"]
