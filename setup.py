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
from setuptools.errors import CompileError


class CMakeExtension(Extension):
    """An extension built by ``source_dir/CMakeLists.txt``. Optional: without it, foreach does the work."""

    def __init__(self, name: str, source_dir: str) -> None:
        super().__init__(name, sources=[], optional=True)
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
            run_cmake(ext.source_dir, build_dir, prefix=module.parent)
        except (OSError, subprocess.CalledProcessError) as error:
            (build_dir / "CMakeCache.txt").unlink(missing_ok=True)  # it remembers a missing compiler
            raise CompileError(
                "see the output above. prodigy_fused is built WITHOUT its compiled module and will run on "
                "the slower foreach backend. Remedy: a C++17 compiler, then pip install --force-reinstall "
                f"--no-cache-dir. What failed: {error}"
            ) from error


def run_cmake(source_dir: Path, build_dir: Path, prefix: Path) -> None:
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
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    for arguments in (configure, ["--build", build_dir], ["--install", build_dir, "--prefix", prefix]):
        subprocess.run([cmake, *arguments], check=True)


def find_tool(name: str) -> str:
    """The tool that pip installed: a virtual environment that is not activated does not have it on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise FileNotFoundError(f"{name} was not found; pip install {name}")
    return tool


setup(ext_modules=[CMakeExtension("prodigy_fused._C", "csrc")], cmdclass={"build_ext": CMakeBuild})
