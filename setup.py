"""Builds the compiled module ``prodigy_fused._C`` with CMake; all else is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError


class BuildPython(build_py):
    """Copies the modules of triton_kernels/ into the package prodigy_fused.triton_kernels, which says why."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        if package == "prodigy_fused.triton_kernels":
            kernels = super().find_package_modules(package, "triton_kernels")
            modules += [module for module in kernels if module[1] != "__init__"]
        return modules


class CMakeExtension(Extension):
    """An extension built by ``source_dir/CMakeLists.txt``. Optional, unless CUDA was asked for: without it, foreach
    does the work."""

    def __init__(self, name: str, source_dir: str) -> None:
        super().__init__(name, sources=[], optional=cuda_mode() != "1")
        self.source_dir = Path(__file__).resolve().parent / source_dir


class CMakeBuild(build_ext):
    """Builds each CMakeExtension. The CompileError of an optional extension is a warning to setuptools."""

    def build_extension(self, ext: CMakeExtension) -> None:
        # Not build_temp: pip's editable install makes that a throw-away folder, and every build a full one.
        build_base = Path(self.get_finalized_command("build").build_base).resolve()
        build_dir = build_base / f"cmake-{sys.implementation.cache_tag}"
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.unlink(missing_ok=True)  # a failed build must not leave yesterday's module to be packaged
        try:
            try:
                run_cmake(ext.source_dir, build_dir, module.parent, cuda := cuda_arguments())
            except subprocess.CalledProcessError:
                if cuda_mode() != "auto" or cuda == WITHOUT_CUDA:
                    raise
                self.warn("the CUDA backend could not be built, see above; trying without it")
                (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
                run_cmake(ext.source_dir, build_dir, module.parent, WITHOUT_CUDA)
        except (OSError, subprocess.CalledProcessError) as error:
            (build_dir / "CMakeCache.txt").unlink(missing_ok=True)  # it remembers a missing compiler
            raise CompileError(
                "see the output above. prodigy_fused is built WITHOUT its compiled module and will run on "
                "the slower foreach backend. Remedy: a C++17 compiler, then pip install --force-reinstall "
                f"--no-cache-dir. What failed: {error}"
            ) from error


def run_cmake(source_dir: Path, build_dir: Path, prefix: Path, cuda: list[str]) -> None:
    """Configures, builds and installs the module into the directory `prefix`."""
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    # Everything is passed every time, or a build directory that is used again would keep the
    # build type of the last build and look for tools in the temporary environment of an earlier pip.
    configure = [
        *("-S", source_dir, "-B", build_dir, "-G", "Ninja"),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *cuda,
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    for arguments in (configure, ["--build", build_dir], ["--install", build_dir, "--prefix", prefix]):
        subprocess.run([cmake, *arguments], check=True)


# nvcc and what it needs, for a machine without a CUDA toolkit; also in the dev extra of pyproject.toml.
NVCC = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]

WITHOUT_CUDA = ["-DPRODIGY_FUSED_CUDA=OFF"]


def cuda_mode() -> str:
    """Returns PRODIGY_FUSED_CUDA. ``auto``: with CUDA if there is an nvcc; ``0``: without; ``1``: with it, or fail."""
    mode = os.environ.get("PRODIGY_FUSED_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"PRODIGY_FUSED_CUDA={mode}: must be auto, 0 or 1")
    return mode


def find_nvcc() -> Path | None:
    """Returns the CUDA compiler: the one asked for, the toolkit's, or the one from PyPI; None if there is none."""
    places = [os.environ.get("CUDACXX")]
    places += [Path(os.environ[name], "bin/nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places += [shutil.which("nvcc"), Path("/usr/local/cuda/bin/nvcc")]
    places += [Path(folder, "nvidia/cu13/bin/nvcc") for folder in sys.path if folder]
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def cuda_arguments() -> list[str]:
    """Returns the arguments of CMake that depend on this machine and on PRODIGY_FUSED_CUDA.

    Raises:
        FileNotFoundError: PRODIGY_FUSED_CUDA is 1, and there is no nvcc; gives the remedy.
    """
    nvcc = find_nvcc() if cuda_mode() != "0" else None
    if nvcc is None:
        if cuda_mode() == "1":
            raise FileNotFoundError(f"PRODIGY_FUSED_CUDA=1, but there is no nvcc; pip install {' '.join(NVCC)}")
        return WITHOUT_CUDA
    arguments = ["-DPRODIGY_FUSED_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if nvcc.parent.parent.name == "cu13":
        # The wheels have their libraries in lib, and nvcc looks in lib64.
        arguments.append(f"-DCMAKE_CUDA_FLAGS=-L{nvcc.parent.parent / 'lib'}")
    return arguments


def find_tool(name: str) -> str:
    """Returns the path of a tool that pip installed, which is not on PATH in an environment that is not activated.

    Raises:
        FileNotFoundError: it is not there; gives the remedy.
    """
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise FileNotFoundError(f"{name} was not found; pip install {name}")
    return tool


setup(
    ext_modules=[CMakeExtension("prodigy_fused._C", "csrc")],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
    # pip installs these into the build's own environment.
    setup_requires=NVCC if cuda_mode() == "1" and find_nvcc() is None else [],
)
