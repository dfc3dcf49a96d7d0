"""What `pip install` of a built wheel brings: the package `harness` with every file of it, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ("tiny/model/model.safetensors", "publish/report/page/index.html", "publish/tables/papers/dps.yaml")


def test_the_wheel_holds_harness_and_all_of_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("harness", "methods", "tasks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path / 'dist')!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {
        "harness",
        "personalization_harness",
    }
    code = {f"harness/{path.relative_to(ROOT / 'harness')}" for path in (ROOT / "harness").rglob("*.py")}
    for room in ("methods", "tasks"):  # links, which rglob does not follow
        code |= {f"harness/{room}/{path.relative_to(ROOT / room)}" for path in (ROOT / room).rglob("*.py")}
    assert code <= names, sorted(code - names)
    assert {f"harness/{name}" for name in DATA} <= names
