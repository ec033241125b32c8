"""Packages and the C++ extension of saemnesia_fast; everything static is in pyproject.toml.

The folder `kernels/` is installed as `saemnesia_fast.kernels`, never as `kernels`: that is the name of a PyPI package
which diffusers and transformers import when they find it.

`saemnesia_fast._C` is built from csrc/ on torch's stable ABI, so that one build serves torch 2.10 and later, and picks
its instruction set when it runs. SAEMNESIA_FAST_BUILD=0 leaves it out: everything works, more slowly.
"""

import os
import sys
from glob import glob

from setuptools import find_packages, setup

PACKAGE = "saemnesia_fast"
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden"]
MACROS = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),
    ("TORCH_STABLE_ONLY", None),
    ("SAEMNESIA_FAST_FLAGS", ",".join(FLAGS)),
]


def extension() -> dict[str, object]:
    """Arguments of `setup` that build `_C`; none where it is not wanted or cannot be built."""
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

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"saemnesia_fast: the C++ extension could not be built ({error}). It needs GCC 9 or Clang 12 or "
                    "later; SAEMNESIA_FAST_BUILD=0 installs without it, which is correct but slower."
                ) from error

    module = CppExtension(
        f"{PACKAGE}._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        include_dirs=[pybind11.get_include()],
        define_macros=MACROS,
        extra_compile_args=FLAGS,
        depends=sorted(glob("csrc/cpu/*.h") + glob("csrc/cpu/*.inl")),
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


packages = find_packages(include=[PACKAGE, f"{PACKAGE}.*"])
kernel_packages = [name for name in find_packages() if name.split(".")[0] == "kernels"]

setup(
    packages=packages + [f"{PACKAGE}.{name}" for name in kernel_packages],
    package_dir={f"{PACKAGE}.kernels": "kernels"},
    package_data={PACKAGE: ["py.typed", "minicanvas/weights/**/*"]},
    **extension(),
)
