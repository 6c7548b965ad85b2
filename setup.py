"""Builds sae_kernels._C with CMake; everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

if sys.platform == "win32":
    # Locks of folders, signals, and the kernels' vector extensions are those of POSIX systems.
    sys.exit("sae-kernels: expected Linux or another POSIX system, got Windows; use WSL 2")

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake with Ninja and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-G",
            "Ninja",
            str(ROOT),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--parallel", jobs], cwd=build, check=True)
        # For CuPy, where the module has no CUDA kernels; an editable install reads csrc itself.
        shutil.copytree(ROOT / "csrc/cuda", target.parent / "cuda_sources", dirs_exist_ok=True)


setup(
    ext_modules=[Extension("sae_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
