"""How strangers' code is named and found."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import pytest

from harness.method import Method
from harness.methods import METHODS
from harness.plugins.registry import from_file, method_class, method_row, source_of

WITH_TWO = """
from harness.methods.rag import RAG

class RecencyContrast(RAG):
    "Two of them in one file."

class CAD2Contrast(RAG):
    "Two of them in one file."
"""


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_same_name_outside_the_repository_as_in_it(name: str) -> None:
    file = Path(inspect.getsourcefile(method_class(name)) or "")
    assert method_row(str(file)).name == name


def test_methods_of_one_file_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(WITH_TWO)
    names = [f"{tmp_path / 'mine.py'}:{name}" for name in ("RecencyContrast", "CAD2Contrast")]
    assert [method_row(name).name for name in names] == ["recency_contrast", "cad2_contrast"]
    made = [from_file(name, Method)() for name in names]
    assert [method_row(method).name for method in made] == ["recency_contrast", "cad2_contrast"]


def test_code_beside_a_file_that_it_imports_is_part_of_its_name(tmp_path: Path) -> None:
    files = {
        "mine.py": "import json\nfrom helper import weight\nfrom parts.more import other\n",
        "helper.py": "import deeper\nweight = 1\n",
        "deeper.py": "depth = 1\n",
        "parts/__init__.py": "",
        "parts/more.py": "from . import own\nother = 2\n",
        "parts/own.py": "third = 3\n",
        "unread.py": "nothing = 0\n",
    }
    (tmp_path / "parts").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    before = source_of(tmp_path / "mine.py")
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}# changed\n")
        assert (source_of(tmp_path / "mine.py") == before) == (name == "unread.py")
        (tmp_path / name).write_text(content)
    alone = tmp_path / "deeper.py"  # of a file without such imports it is the hash of its bytes, as ever
    assert source_of(alone) == hashlib.sha256(alone.read_bytes()).hexdigest()[:16]
