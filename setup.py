"""Packages, the C++ extension and the CUDA extension of saemnesia_fast; everything static is in pyproject.toml.

The folder `kernels/` is installed as `saemnesia_fast.kernels`, never as `kernels`: that is the name of a PyPI package
which diffusers and transformers import when they find it.

`saemnesia_fast._C` is built from csrc/ on torch's stable ABI, so that one build serves torch 2.10 and later, and picks
its instruction set when it runs. `saemnesia_fast._C_cuda` is built beside it where torch has CUDA and there is a
toolkit (CUDA_HOME); FORCE_CUDA=1 builds it on any torch, FORCE_CUDA=0 on none; TORCH_CUDA_ARCH_LIST chooses the GPUs.
SAEMNESIA_FAST_BUILD=0 leaves out both: everything works, more slowly.
"""

import os
import sys
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

PACKAGE = "saemnesia_fast"
FUSED = ["-ffp-contract=fast", "--param=avoid-fma-max-bits=0"]
"""x y + z rounds once, whatever processor the compiler tunes for: for some, GCC would round the products of a chain."""
FLAGS = ["-std=c++17", "-O3", "-g0", *FUSED, "-fno-math-errno", "-fvisibility=hidden"]
MACROS = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),
    ("TORCH_STABLE_ONLY", None),
    ("SAEMNESIA_FAST_FLAGS", ",".join(FLAGS)),
]
ARCHITECTURES = ["80", "90", "100", "120"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def architectures() -> list[str]:
    """Compute capabilities without their dot: those of TORCH_CUDA_ARCH_LIST, else every generation from 8.0 on."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace("+PTX", "").replace(".", "").split()
    return given or ARCHITECTURES


def nvcc_flags() -> list[str]:
    """Code for each architecture, and of the last its portable form, for those to come."""
    names = architectures()
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*NVCC_FLAGS, *targets, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


def cuda_toolkit() -> Path | None:
    """The toolkit to build `_C_cuda` with, or None where it is not to be built."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = os.environ.get("FORCE_CUDA", "1" if torch.version.cuda else "0")
    if wanted == "0":
        return None
    folders = [Path(folder) for folder in (os.environ.get("CUDA_HOME"), CUDA_HOME, "/usr/local/cuda") if folder]
    found = next((folder for folder in folders if (folder / "include" / "cuda_runtime_api.h").exists()), None)
    if found is None and os.environ.get("FORCE_CUDA"):
        raise SystemExit("saemnesia_fast: FORCE_CUDA is set, but there is no CUDA toolkit: set CUDA_HOME to its folder")
    return found


def cuda_libraries() -> list[str]:
    """What `_C_cuda` is linked with; where torch has no CUDA, its name of torch's stream stays open."""
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    return [*(["torch_cuda"] if library.exists() else []), "cudart_static", "dl", "pthread", "rt"]


def extension() -> dict[str, object]:
    """Arguments of `setup` that build `_C` and `_C_cuda`; none where they are not wanted or cannot be built."""
    if os.environ.get("SAEMNESIA_FAST_BUILD") == "0":
        return {}
    if sys.platform == "win32":
        print("saemnesia_fast: no C++ extension on Windows; building without it", file=sys.stderr)
        return {}
    try:
        import pybind11
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        missing = (error.name or "torch").split(".")[0]
        print(
            f"saemnesia_fast: building without the C++ extension, as {missing} cannot be imported. "
            "To have it, install torch and pybind11 first, then this package with --no-build-isolation.",
            file=sys.stderr,
        )
        return {}

    toolkit = cuda_toolkit()

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"saemnesia_fast: the C++ extension could not be built ({error}). It needs GCC 9 or Clang 12 or "
                    "later; SAEMNESIA_FAST_BUILD=0 installs without it, which is correct but slower."
                ) from error

        def build_extension(self, module: Any) -> None:
            if module.name.endswith("._C_cuda"):
                module.extra_objects = self.compile_cuda()
            super().build_extension(module)

        def compile_cuda(self) -> list[str]:
            """With nvcc alone: torch's own way needs a torch built for the toolkit's version."""
            objects = []
            try:
                for source in sorted(glob("csrc/cuda/*.cu")):
                    objects.append(str(Path(self.build_temp, Path(source).stem + ".cuda.o").resolve()))
                    Path(objects[-1]).parent.mkdir(parents=True, exist_ok=True)
                    self.spawn(
                        [str(toolkit / "bin" / "nvcc"), *nvcc_flags(), "--threads=4", "-c", source, "-o", objects[-1]]
                    )
            except Exception as error:
                raise SystemExit(
                    f"saemnesia_fast: the CUDA extension could not be built ({error}). It needs CUDA 12.8 or later, or "
                    "TORCH_CUDA_ARCH_LIST with what the toolkit knows; FORCE_CUDA=0 installs without it."
                ) from error
            return objects

    headers = sorted(glob("csrc/*.h") + glob("csrc/*/*.h") + glob("csrc/*/*.inl") + glob("csrc/*/*.cuh"))
    modules = [
        CppExtension(
            f"{PACKAGE}._C",
            sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            include_dirs=[pybind11.get_include()],
            define_macros=MACROS,
            extra_compile_args=FLAGS,
            depends=headers,
        )
    ]
    if toolkit:
        modules.append(
            CppExtension(
                f"{PACKAGE}._C_cuda",
                sorted(glob("csrc/cuda/*.cpp")),
                include_dirs=[pybind11.get_include(), str(toolkit / "include")],
                library_dirs=[str(toolkit / "lib64")],
                libraries=cuda_libraries(),
                define_macros=[
                    *MACROS,
                    ("USE_CUDA", None),
                    ("SAEMNESIA_FAST_ARCHITECTURES", ",".join(architectures())),
                ],
                extra_compile_args=FLAGS,
                depends=headers + sorted(glob("csrc/cuda/*.cu")),
            )
        )
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


packages = find_packages(include=[PACKAGE, f"{PACKAGE}.*"])
kernel_packages = [name for name in find_packages() if name.split(".")[0] == "kernels"]

setup(
    packages=packages + [f"{PACKAGE}.{name}" for name in kernel_packages],
    package_dir={f"{PACKAGE}.kernels": "kernels"},
    package_data={PACKAGE: ["py.typed", "configs/*.json", "minicanvas/weights/**/*"]},
    **extension(),
)
