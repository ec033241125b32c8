"""Packages of saemnesia_fast; everything static is in pyproject.toml.

The folder `kernels/` is installed as `saemnesia_fast.kernels`, never as `kernels`: that is the name of a PyPI package
which diffusers and transformers import when they find it.
"""

from setuptools import find_packages, setup

PACKAGE = "saemnesia_fast"

packages = find_packages(include=[PACKAGE, f"{PACKAGE}.*"])
kernel_packages = [name for name in find_packages() if name.split(".")[0] == "kernels"]

setup(
    packages=packages + [f"{PACKAGE}.{name}" for name in kernel_packages],
    package_dir={f"{PACKAGE}.kernels": "kernels"},
    package_data={PACKAGE: ["py.typed", "minicanvas/weights/**/*"]},
)
