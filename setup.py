"""The compiled parts of the package. The rest of the project's description is in pyproject.toml.

- ``fastprefix._C`` has the kernels for processors. Where it cannot be built, the reason is printed and written to
  ``fastprefix/_C_absent.txt``, from which ``fastprefix._extension`` tells it.
- ``fastprefix/libfastprefix_cuda.*.so`` has the CUDA kernels. It is built where there are nvcc and a torch with CUDA.
  Elsewhere the reason is written to ``fastprefix/_cuda_absent.txt``, from which ``fastprefix.cuda_library`` tells it;
  most machines have no use for it, so nothing is printed but the failure of a compiler.

The package works without either, so an install goes on. Environment variables:

- ``FASTPREFIX_BUILD_NATIVE``: 0 leaves the extension out; 1 makes an install without it an error;
- ``FASTPREFIX_BUILD_CUDA``: 0 leaves the CUDA kernels out; 1 builds them with any torch, and makes an install without
  them an error; ``fastprefix/cuda_library/build.py`` has the variables that say how;
- ``FASTPREFIX_SANITIZE``: names of sanitizers, as in ``address,undefined``, with which it is built for debugging;
- ``CXX`` and ``MAX_JOBS``: the compiler and how many of it may run at once, as for every extension of torch.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NAME = "fastprefix._C"
REASON = "_C_absent.txt"
REQUEST = os.environ.get("FASTPREFIX_BUILD_NATIVE", "")
CUDA_REASON = "_cuda_absent.txt"
CUDA_REQUEST = os.environ.get("FASTPREFIX_BUILD_CUDA", "")
SANITIZERS = os.environ.get("FASTPREFIX_SANITIZE", "")
# setuptools wants paths relative to this file's folder, which is the working folder of every build.
SOURCES = sorted(glob.glob("csrc/ops/*.cpp") + glob.glob("csrc/cpu/*.cpp"))
HEADERS = sorted(glob.glob("csrc/ops/*.h") + glob.glob("csrc/cpu/*.h"))

# at::parallel_for is a template over OpenMP. It is compiled with OpenMP but not linked with a runtime of OpenMP: torch
# brings one, and a second in the process would have threads of its own.
# GCC 12 takes arguments of its own AVX-512 intrinsics for uninitialized.
COMPILE = ["-std=c++20", "-ffp-contract=fast", "-fopenmp", "-fno-math-errno", "-fwrapv", "-fvisibility=hidden"]
COMPILE += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
OPTIMIZE = ["-O3", "-g0"]
SANITIZE = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


def obstacle() -> str:
    """Why a build cannot be tried here, or nothing."""
    if REQUEST == "0":
        return "it was left out by FASTPREFIX_BUILD_NATIVE=0"
    if not sys.platform.startswith("linux"):
        return f"its kernels are for Linux, and this is {platform.system()}"
    if not SOURCES:
        return "its sources, the folder csrc, were not there"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"there was no C++ compiler: {compiler} was not found, and the environment variable CXX can name another"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers were not there, which a system's package such as python3-dev brings"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except (ImportError, OSError) as error:
        return (
            f"torch could not be imported during the build ({error}). pip builds in an empty environment, unless torch"
            " and setuptools are installed first and the package with pip install --no-build-isolation"
        )
    return ""


def load_cuda_builder() -> ModuleType:
    """The package's own builder, by its path: the package itself would need torch."""
    spec = importlib.util.spec_from_file_location("cuda_builder", "fastprefix/cuda_library/build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda_obstacle() -> str:
    """Why the CUDA kernels are not to be built here, or nothing."""
    if CUDA_REQUEST == "0":
        return "it was left out by FASTPREFIX_BUILD_CUDA=0"
    if not sys.platform.startswith("linux"):
        return f"it is for Linux, and this is {platform.system()}"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch could not be imported during the build ({error})"
    if torch.version.cuda is None and CUDA_REQUEST != "1":
        return f"the torch of the build, {torch.__version__}, had no CUDA"
    return ""


OBSTACLE = obstacle()
if OBSTACLE:
    Base, extension = build_ext, Extension(NAME, SOURCES)
else:
    import torch
    from torch.utils.cpp_extension import BuildExtension as Base
    from torch.utils.cpp_extension import CppExtension

    # ninja, as a package, lies next to the interpreter, which PATH does not name when nothing is activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    extension = CppExtension(
        NAME,
        SOURCES,
        depends=HEADERS,
        include_dirs=[os.path.abspath("csrc")],  # ninja runs in another folder
        # Part of the command line, so that another torch compiles every file again.
        define_macros=[("FASTPREFIX_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args=COMPILE + (SANITIZE if SANITIZERS else OPTIMIZE),
        extra_link_args=[f"-fsanitize={SANITIZERS}"] if SANITIZERS else [],
    )


class BuildLibraries(Base):
    """Builds the libraries, or leaves the reasons where they would lie. It never leaves an older build there."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # An editable install would compile into a new temporary folder each time.
            self.build_temp = os.path.join("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def run(self) -> None:
        folder = Path(self.get_ext_fullpath(NAME)).parent
        self._build_native()
        self._build_cuda(folder)

    def _build_cuda(self, folder: Path) -> None:
        builder = load_cuda_builder()
        for old in folder.glob(f"{builder.NAME}.*.so"):
            old.unlink()
        record = folder / CUDA_REASON
        record.unlink(missing_ok=True)
        reason = cuda_obstacle()
        try:
            if not reason:
                sources, nvcc = builder.find_sources(Path("fastprefix").resolve()), builder.find_nvcc()
                torch_folder = Path(sys.modules["torch"].__file__).parent
                builder.build(folder / builder.installed_name(sources), sources, nvcc, torch_folder)
                return
        except builder.BuildError as error:
            reason = str(error)
            if error.output:
                print(f"{error.output}\nfastprefix: its CUDA kernels are not built: {reason}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{reason}\n")
        if CUDA_REQUEST == "1":
            raise SystemExit(f"fastprefix: FASTPREFIX_BUILD_CUDA=1 asks for the CUDA kernels: {reason}")

    def _build_native(self) -> None:
        library = Path(self.get_ext_fullpath(NAME))
        record = library.with_name(REASON)
        reason = OBSTACLE or self._failure()
        if not reason:
            record.unlink(missing_ok=True)
            return
        print(f"fastprefix: its compiled extension is not built: {reason}", file=sys.stderr)
        library.unlink(missing_ok=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{reason}\n")
        if REQUEST == "1":
            raise SystemExit("fastprefix: FASTPREFIX_BUILD_NATIVE=1 asks for the compiled extension")
        self.extensions = []  # what is asked afterwards for the files that were built

    def _failure(self) -> str:
        """Build it; why that failed, in one line, or nothing."""
        try:
            super().run()
        except Exception as error:  # a compiler, its wrapper, ninja and the linker each raise errors of their own
            words = " ".join(str(error).split())
            return f"the build failed ({type(error).__name__}: {words}); pip install -v shows what the compiler said"
        return ""


setup(ext_modules=[extension], cmdclass={"build_ext": BuildLibraries})
