"""`kernels/` is installed as `saemnesia_fast.kernels` and never as `kernels`; importing the package stays light."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import saemnesia_fast

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["saemnesia_fast", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"]


def python(code: str, *arguments: object, flags: tuple[str, ...] = (), cwd: Path) -> dict[str, object]:
    """Run `code` in a fresh interpreter that has `cwd` on its path, and return the JSON object that it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, *flags, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def pip(*arguments: object, cwd: Path) -> None:
    """Without the C++ extension: `make` builds it, and it takes long."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    environment = os.environ | {"SAEMNESIA_FAST_BUILD": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: setuptools writes into the folder that it builds."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    return next(folder.glob("saemnesia_fast-*.whl"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds an installation from the wheel, or an editable one."""
    folder = tmp_path_factory.mktemp(request.param)
    what = [request.getfixturevalue("wheel")] if request.param == "wheel" else ["--editable", source]
    pip("install", "--no-deps", "--no-build-isolation", "--target", folder, *what, cwd=folder)
    return folder


def test_wheel_holds_every_module_once_and_no_top_level_kernels(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "saemnesia_fast").rglob("*.py")}
    expected |= {f"saemnesia_fast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected
    weights = ROOT / "saemnesia_fast" / "minicanvas" / "weights"
    expected_data = {path.relative_to(ROOT).as_posix() for path in weights.rglob("*") if path.is_file()}
    assert expected_data | {"saemnesia_fast/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "saemnesia_fast",
        f"{'-'.join(wheel.name.split('-')[:2])}.dist-info",
    }
    top_level = next(name for name in names if name.endswith("top_level.txt"))
    assert zipfile.ZipFile(wheel).read(top_level).decode().split() == ["saemnesia_fast"]


def test_installation_never_shadows_the_package_kernels(installed: Path, source: Path, tmp_path: Path) -> None:
    """-S keeps the installation under which the tests themselves run out of the way."""
    code = """
import json, site, sys
from importlib.util import find_spec
site.addsitedir(sys.argv[1])
sys.path += sys.argv[2:]
import saemnesia_fast.kernels
import diffusers.utils, transformers.utils
spec = find_spec("kernels")
print(json.dumps({
    "ours": saemnesia_fast.kernels.__file__,
    "kernels": spec and spec.origin,
    "diffusers": diffusers.utils.is_kernels_available(),
    "transformers": transformers.utils.is_kernels_available(),
}))
"""
    paths = sysconfig.get_paths()
    result = python(code, installed, paths["purelib"], paths["platlib"], flags=("-S",), cwd=tmp_path)
    assert Path(str(result.pop("ours"))).is_relative_to(installed if "wheel" in installed.name else source)
    assert result == {"kernels": None, "diffusers": False, "transformers": False}


def test_root_as_working_directory_does_not_pass_for_the_package_kernels() -> None:
    """`python -m` and `python -c` in a checkout put its root, and so the folder kernels/, on sys.path."""
    code = """
import json
import diffusers.utils, transformers.utils, kernels
print(json.dumps([kernels.__file__, diffusers.utils.is_kernels_available(), transformers.utils.is_kernels_available()]))
"""
    assert python(code, cwd=ROOT) == [str(ROOT / "kernels" / "__init__.py"), False, False]


def test_importing_any_module_touches_neither_triton_nor_cuda_nor_diffusers(tmp_path: Path) -> None:
    """All but `erasure`, whose hooks are diffusers' hooks, and `minicanvas`, which builds a pipeline."""
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "saemnesia_fast").rglob("*.py")]
    names = [".".join(part for part in path.parts if part != "__init__") for path in sorted(files)]
    modules = [name for name in names if name.split(".")[1:2] not in (["erasure"], ["minicanvas"])]
    code = """
import json, sys
from importlib import import_module
touched = {}
for name in sys.argv[1:]:
    before = set(sys.modules)
    import_module(name)
    touched[name] = sorted({"triton", "diffusers", "transformers", "peft"} & (set(sys.modules) - before))
import torch
touched["torch.cuda"] = ["initialised"] if torch.cuda.is_initialized() else []
print(json.dumps({name: what for name, what in touched.items() if what}))
"""
    assert python(code, *(name for name in modules if not name.endswith("__main__")), cwd=tmp_path) == {}


@pytest.mark.parametrize("name", saemnesia_fast.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(saemnesia_fast, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'apply_eraser'"):
        _ = saemnesia_fast.apply_eraser
