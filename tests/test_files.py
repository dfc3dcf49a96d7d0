"""What is written is written whole, by one process, under names that no id can choose; no link is followed."""

from __future__ import annotations

import ast
import errno
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import files
from harness.errors import HarnessError, UsageError
from harness.files import Lock, file_name, id_of, named, names_of, replace_file, replacing_folder, write_names
from harness.files.locks import try_lock
from harness.fit.artifacts import ArtifactStore
from harness.method import Fitted

# Names

ODD = ["", ".", "..", "...", "../../escaped", "/etc/passwd", "a/b", "a\\b", "a\x00b", "-rf", "~", "%2E", "CON", "con.txt", "a.",
       "collective", "names.json", "x" * 300, "é" * 200, "\ud83d", "a b", "C:", "user@host", "*", "\n", ".hidden", "a~b"]  # fmt: skip


@given(st.text(st.characters()) | st.sampled_from(ODD))
def test_a_name_is_one_plain_component_and_reads_back(id: str):
    name = file_name(id)
    assert name.isascii() and 0 < len(name) < 200 and not set("/\\\x00: *?<>|\"'\n") & set(name)
    assert name not in (".", "..") and name[0] not in ".-"
    if "~" not in name or name == "~":
        assert id_of(name) == id


def test_usual_ids_are_their_own_names():
    assert [file_name(id) for id in ("12", "A3SGXH7AUHU8GW", "user_7", "a.b-c")] == [
        "12", "A3SGXH7AUHU8GW", "user_7", "a.b-c",
    ]  # fmt: skip


@given(st.sets(st.text(st.characters(), max_size=3) | st.sampled_from([*ODD, "Ann", "ann", "ANN"])))
def test_no_two_ids_share_a_name_wherever_case_is_not_told_apart(ids: set[str]):
    names = names_of(ids)
    assert names.keys() == ids and len({name.lower() for name in names.values()}) == len(ids)


def test_every_odd_id_has_a_folder_of_its_own_inside_and_is_found_again(tmp_path: Path):
    names = names_of([*ODD, "Ann", "ann"])
    for name in names.values():
        (tmp_path / name).mkdir()
    write_names(tmp_path, names)
    assert {named(tmp_path, id) for id in names} == {tmp_path / name for name in names.values()}


def test_folders_made_elsewhere_are_found_by_the_id_itself_but_never_outside(tmp_path: Path):
    (tmp_path / "of users" / "user 7").mkdir(parents=True)
    assert named(tmp_path / "of users", "user 7") == tmp_path / "of users" / "user 7"
    for id in ("..", "../of users", "", ".", "/tmp", "a\x00b", "\ud83d"):
        assert named(tmp_path / "of users", id).parent == tmp_path / "of users"
    (tmp_path / "names.json").write_text('{"../../x": "me", "n": "you"}')
    assert named(tmp_path, "me") == tmp_path / "me" and named(tmp_path, "you") == tmp_path / "n"


# Whole


def test_a_link_in_the_way_of_a_draft_or_of_the_file_is_not_followed(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    place = tmp_path / "run"
    place.mkdir()
    (place / "run.json").symlink_to(victim)
    for name in ("run.json.tmp", ".run.json.aaaa.draft"):
        (place / name).symlink_to(victim)
    replace_file(place / "run.json", b"new")
    assert victim.read_text() == "mine"
    assert (place / "run.json").read_bytes() == b"new" and not (place / "run.json").is_symlink()
    (place / "samples.jsonl").symlink_to(victim)
    with pytest.raises(UsageError, match=r"samples\.jsonl is a link or no file.*remove it"):
        files.append(place / "samples.jsonl", b"line")
    assert victim.read_text() == "mine"


def killed(code: str, place: Path) -> None:
    """Runs `code` in a process that kills itself where the code says `die()`."""
    head = "import os, signal, sys\nfrom pathlib import Path\nimport harness.files.whole\nfrom harness import files\n"
    head += "place = Path(sys.argv[1])\n"
    head += "def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run([sys.executable, "-c", head + code, str(place)], timeout=60)
    assert done.returncode == -9


def test_a_writer_killed_before_the_end_leaves_the_old_and_the_next_one_clears_up(tmp_path: Path):
    replace_file(tmp_path / "board.md", b"old")
    with replacing_folder(tmp_path / "report") as draft:
        (draft / "index.html").write_text("old")
    killed("os.replace = die\nfiles.replace_file(place / 'board.md', b'new')", tmp_path)
    killed(
        "with files.replacing_folder(place / 'report') as d:\n (d / 'index.html').write_text('new'); die()", tmp_path
    )
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "board.md").read_text() == (tmp_path / "report" / "index.html").read_text() == "old"
    replace_file(tmp_path / "board.md", b"newer")
    with replacing_folder(tmp_path / "report") as draft:
        (draft / "page.html").write_text("newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["board.md", "report"]
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["page.html"]


def test_without_an_exchange_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path):
    code = """
files.whole._exchange = lambda *_: False
rename = os.rename
def once(a, b):
    die() if str(a).endswith('.draft') and not (place / 'report').exists() else rename(a, b)
with files.replacing_folder(place / 'report') as draft:
    (draft / 'x').mkdir()
    os.rename = once
"""
    with replacing_folder(tmp_path / "report") as draft:
        (draft / "index.html").write_text("old")
    killed(code, tmp_path)
    assert not (tmp_path / "report").exists()
    with replacing_folder(tmp_path / "report", keep=True):
        pass
    assert (tmp_path / "report" / "index.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path):
    with replacing_folder(tmp_path / "report") as mine:
        with replacing_folder(tmp_path / "report") as other:
            (other / "b").write_text("")
        assert mine.is_dir()
        (mine / "a").write_text("")
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["a"]


def test_a_draft_that_is_being_cleared_up_is_not_begun_by_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else the one removes what the other has just put into place."""
    (tmp_path / ".x.00000000.draft").mkdir()
    remove, taken = shutil.rmtree, []

    def look(path: Path, *args: Any, **options: Any) -> None:
        if os.path.isdir(path):
            file = os.open(path, os.O_RDONLY)
            taken.append(try_lock(file))
            os.close(file)
        remove(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", look)
    with replacing_folder(tmp_path / "x") as draft:
        (draft / "a").touch()
    assert taken == [False] and os.listdir(tmp_path) == ["x"]


def test_a_refusal_of_the_system_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match=r"cannot write .*file/x: Not a directory"):
        replace_file(tmp_path / "file" / "x", b"")
    with (
        pytest.raises(HarnessError, match=r"cannot write .*file/x: .* exists"),
        replacing_folder(tmp_path / "file" / "x"),
    ):
        pass


def test_a_killed_fit_leaves_no_folder_in_the_store_for_ever(tmp_path: Path):
    code = """
import torch
from harness.fit.artifacts import ArtifactStore
from harness.method import Fitted
Path.write_text = die
ArtifactStore(place).put('0' * 16, Fitted({'a': torch.zeros(2)}), {})
"""
    killed(code, tmp_path)
    assert len(list((tmp_path / ".drafts").iterdir())) == 1
    store = ArtifactStore(tmp_path)
    assert store.get("0" * 16) is None
    store.put("1" * 16, Fitted({"a": torch.zeros(2)}), {})
    assert [path.name for path in (tmp_path / ".drafts").iterdir()] == []


# One writer


@pytest.mark.parametrize("kind", ["symlink", "hard link", "folder", "fifo"])
def test_something_else_in_the_place_of_a_lock_is_named_and_left_alone(tmp_path: Path, kind: str):
    victim, lock = tmp_path / "victim", tmp_path / "run" / "lock"
    victim.write_text("mine")
    lock.parent.mkdir()
    make = {"symlink": lambda: lock.symlink_to(victim), "hard link": lambda: lock.hardlink_to(victim),
            "folder": lock.mkdir, "fifo": lambda: os.mkfifo(lock)}  # fmt: skip
    make[kind]()
    with pytest.raises(UsageError, match="lock is a link or no file, and is not written through; remove it"):
        Lock.take(lock)
    assert victim.read_text() == "mine"


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)


@pytest.mark.usefixtures("_no_locks")
@pytest.mark.parametrize("holder", ["pid 4 on elsewhere", f"pid 1 on {os.uname().nodename}", ""])
def test_without_locks_the_message_says_which_file_to_delete(tmp_path: Path, holder: str):
    (tmp_path / "lock").write_text(holder)
    with pytest.raises(UsageError, match=r"if that run has ended, delete .*/lock and give the command again"):
        Lock.take(tmp_path / "lock")
    (tmp_path / "lock").unlink()
    lock = Lock.take(tmp_path / "lock")
    with pytest.raises(UsageError, match=f"pid {os.getpid()} on"):
        Lock.take(tmp_path / "lock")
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_no_locks")
def test_without_locks_drafts_go_after_a_day(tmp_path: Path):
    for name, age in (("new", 0), ("old", 2 * 86400)):
        draft = tmp_path / f".x.{name}.draft"
        draft.write_text("")
        os.utime(draft, (time.time() - age,) * 2)
    replace_file(tmp_path / "x", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.new.draft", "x"]


# Who writes


WRITES = {
    "write_text",
    "write_bytes",
    "savefig",
    "save_pretrained",
    "save_file",
    "save_torch_state_dict",
    "copyfile",
    "copy2",
    "copytree",
}
INSIDE = {
    "harness/cli/fetch/download.py": "a part, taken up where it stopped and renamed when it is whole",
    "harness/cli/fetch/wordnet.py": "a draft folder",
    "harness/cli/push.py": "a folder that is sent and thrown away",
    "harness/engine/weights/adapters.py": "the draft folder of an export",
    "harness/engine/weights/gguf_files.py": "the draft folder of a user's cache",
    "harness/fit/artifacts.py": "the draft folder of a state",
    "harness/fit/vector_files.py": "a draft",
    "harness/grid/executors.py": "the log of a worker",
    "harness/grid/folder.py": "a draft, renamed when it is whole",
    "harness/grid/on_ray.py": "the log of a worker",
    "harness/publish/figures/style.py": "memory",
    "harness/publish/report/__init__.py": "a draft folder",
    "harness/publish/report/by_user.py": "the report's draft folder",
    "harness/tiny/train.py": "the draft folder of a training",
}
"""Files that write by themselves, and into what."""


def _writes(call: ast.Call) -> bool:
    """Whether the call writes a file at once, so that a kill leaves a part of it."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    of = call.func.value.id if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) else ""
    if name == "open" and of != "os":
        words = [
            n.value
            for a in (*call.args, *(k.value for k in call.keywords))
            for n in ast.walk(a)
            if isinstance(n, ast.Constant)
        ]
        return any(
            isinstance(w, str) and re.fullmatch(r"[rwax][bt]?\+?", w) and w[0] + w[-1] not in ("rr", "rb", "rt")
            for w in words
        )
    return name in WRITES or (of, name) in {("torch", "save"), ("json", "dump"), ("np", "save")}


def test_every_file_is_written_whole_by_the_same_functions() -> None:
    """Whatever writes by itself does so into a draft, a log or memory; all else goes through `harness.files`."""
    root = Path(__file__).parents[1]
    found = {
        path.relative_to(root).as_posix()
        for room in ("harness", "methods", "tasks")
        for path in (root / room).rglob("*.py")
        if not {"methods", "tasks"} & set(path.relative_to(root).parts[1:2])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _writes(node)
    }
    assert found == set(INSIDE)
