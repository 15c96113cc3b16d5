"""What is uploaded: versions that agree, libraries that run everywhere, and how the package finds the CUDA library."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import script

import flatlora_kernels
from flatlora_kernels import backends
from flatlora_kernels.backends.shared import library

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "release/wheels.py").exists(), reason="needs a checkout")


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    return script("release/wheels.py")


def test_one_version_everywhere(wheels: ModuleType) -> None:
    version = flatlora_kernels.__version__
    assert wheels.version() == version
    for name, pattern, count in (
        ("CITATION.cff", r"^version: (.+)$", 1),
        ("CHANGELOG.md", r"^## (\S+)", None),
        ("pyproject.toml", r'"flatlora-kernels-cu1[23]==([^;"]+)', 2),
    ):
        found = re.findall(pattern, (ROOT / name).read_text(), re.M)
        assert found and found[0] == version, name
        if count is not None:
            assert found == [version] * count, name


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="names of glibc's symbols")
def test_the_cpu_library_needs_an_old_libc_and_nothing_else() -> None:
    """One with the C++ runtime of the compiler asks for a glibc as new as the compiler."""
    path = library.find("flatlora_cpu")
    if path is None or not shutil.which("readelf"):
        pytest.skip("needs the library and readelf")
    text = subprocess.run(
        ["readelf", "--wide", "--dynamic", "--dyn-syms", path], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"NEEDED.*\[(.+?)\]", text)) <= {"libc.so.6", "libm.so.6"}
    asked = {tuple(map(int, v.split("."))) for v in re.findall(r"@GLIBC_([\d.]+)", text)}
    assert asked and max(asked) <= (2, 17)
    exported = re.findall(r"GLOBAL +DEFAULT +\d+ (\S+)$", text, re.M)
    assert exported and all(name.startswith("flatlora_cpu_") for name in exported)


def test_the_cuda_library_of_another_wheel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That for torch's version of CUDA, without importing it; the package's own comes before."""
    for major in ("12", "13"):
        folder = tmp_path / f"flatlora_kernels_cu{major}"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise AssertionError('imported')")
        (folder / "libflatlora_cuda.so").write_text("")
    own = Path(library.__file__).parents[2] / "lib"
    if (own / "libflatlora_cuda.so").exists():
        pytest.skip("this installation has a CUDA library of its own")
    monkeypatch.syspath_prepend(tmp_path)
    for version, expected in (("12.8", "12"), ("13.0", "13"), (None, "13")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert (
            library.find("flatlora_cuda") == tmp_path / f"flatlora_kernels_cu{expected}/libflatlora_cuda.so"
        )
    assert not [name for name in sys.modules if name.startswith("flatlora_kernels_cu")]
    shutil.rmtree(tmp_path / "flatlora_kernels_cu13")
    importlib.invalidate_caches()
    assert library.find("flatlora_cuda") == tmp_path / "flatlora_kernels_cu12/libflatlora_cuda.so"
    cuda = backends.get("cuda")
    monkeypatch.setattr(cuda, "_EMULATED", False)
    assert cuda._path() == tmp_path / "flatlora_kernels_cu12/libflatlora_cuda.so"


def made(folder: Path, name: str, *files: str) -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file in files:
            archive.writestr(file, "")
    return folder / name


def test_wheels_that_few_can_install_are_refused(wheels: ModuleType, tmp_path: Path) -> None:
    so = "flatlora_kernels/lib/libflatlora_cpu.so"
    good = "flatlora_kernels-0.1.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    wheels.check(made(tmp_path, good, so))
    for name, files, sentence in (
        (good.replace("2_17", "2_35").replace(".manylinux2014_x86_64", ""), [so], "manylinux_2_28 or older"),
        (good.replace("py3-none", "cp311-cp311"), [so], "manylinux_2_28 or older"),
        (good.replace("manylinux_2_17_x86_64.manylinux2014", "linux"), [so], "manylinux_2_28 or older"),
        (good, [], "expected one library"),
        (good, [so, "flatlora_kernels.libs/libgomp.so.1"], "expected one library"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            wheels.check(made(tmp_path, name, *files))
