"""Downloads come whole, go on where they broke, and say in one line what is wrong. The server is on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from harness.cli.app import main
from harness.cli.fetch import download
from harness.errors import DataMissing, UsageError
from harness.task import Selection
from harness.tasks.lamp import Lamp4

QUESTIONS = [
    {"id": str(i), "input": f"Generate a headline for the following article: {'word ' * 99}", "profile": []}
    for i in range(99)
]
GOLDS = {"task": "LaMP_4", "golds": [{"id": str(i), "output": "A title"} for i in range(99)]}
FILES = {
    "/LaMP_4/dev/dev_questions.json": json.dumps(QUESTIONS).encode(),
    "/LaMP_4/dev/dev_outputs.json": json.dumps(GOLDS).encode(),
}


class Server(ThreadingHTTPServer):
    files: dict[str, bytes]
    version = '"1"'
    break_after: int | None = None
    """Bytes of an answer after which the connection closes, as often as `breaks` says."""
    breaks = 0
    statuses: list[int]
    """Given before anything else, one a request."""
    seen: list[tuple[str, str | None]]
    """Path and Range of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.seen.append((self.path, wanted))
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        if self.path not in server.files:
            return self.send_error(404)
        content, start = server.files[self.path], 0
        if wanted and self.headers.get("If-Range") == server.version:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", server.version)
        self.end_headers()
        if server.break_after is not None and server.breaks:
            server.breaks -= 1
            self.wfile.write(content[start : start + server.break_after])
            return None
        self.wfile.write(content[start:])
        return None

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server(("127.0.0.1", 0), Handler)
    running.files, running.statuses, running.seen = dict(FILES), [], []
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def get(server: Server, dest: Path, **options) -> Path:
    return download.get("lamp4", dest=dest, base_url=server.url, **({"parts": ["dev"], "progress": False} | options))


def test_files_come_whole_with_a_manifest_and_a_task_reads_them(server, tmp_path):
    folder = get(server, tmp_path)
    assert folder == tmp_path / "LaMP_4"
    manifest = json.loads((folder / "manifest.json").read_text())
    for path, content in FILES.items():
        name = path.removeprefix("/LaMP_4/")
        assert (folder / name).read_bytes() == content
        assert manifest["files"][name] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "dev_outputs.json", "dev_questions.json", "manifest.json",
    ]  # fmt: skip
    assert len(Lamp4(data=str(tmp_path)).items(Selection())) == 99


def test_a_second_call_asks_for_nothing_and_a_damaged_file_is_fetched_again(server, tmp_path):
    folder = get(server, tmp_path)
    server.seen.clear()
    get(server, tmp_path)
    assert server.seen == []
    (folder / "dev/dev_outputs.json").write_bytes(b"[]")
    get(server, tmp_path)
    assert [path for path, _ in server.seen] == ["/LaMP_4/dev/dev_outputs.json"]


def test_a_broken_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.break_after, server.breaks = 1000, 3
    get(server, tmp_path)
    assert (tmp_path / "LaMP_4/dev/dev_questions.json").read_bytes() == FILES["/LaMP_4/dev/dev_questions.json"]
    assert "bytes=1000-" in [wanted for _, wanted in server.seen]


def test_a_later_call_goes_on_from_what_an_earlier_one_left(server, tmp_path):
    server.break_after, server.breaks = 100, 10**6
    with pytest.raises(DataMissing, match=r"the connection broke.*500 bytes are kept, run the same command"):
        get(server, tmp_path)
    assert not (tmp_path / "LaMP_4/manifest.json").exists()
    server.breaks = 0
    server.seen.clear()
    get(server, tmp_path)
    assert server.seen[0][1] == "bytes=500-"
    assert (tmp_path / "LaMP_4/dev/dev_outputs.json").read_bytes() == FILES["/LaMP_4/dev/dev_outputs.json"]


def test_a_file_that_changed_on_the_server_is_not_continued(server, tmp_path):
    server.break_after, server.breaks = 100, 5
    with pytest.raises(DataMissing):
        get(server, tmp_path)
    changed = json.dumps(GOLDS | {"golds": GOLDS["golds"][::-1]}).encode()
    server.files["/LaMP_4/dev/dev_outputs.json"], server.version = changed, '"2"'
    get(server, tmp_path)
    assert (tmp_path / "LaMP_4/dev/dev_outputs.json").read_bytes() == changed


def test_a_server_in_trouble_is_asked_again_and_a_part_it_refuses_is_dropped(server, tmp_path):
    server.statuses = [503, 416]
    get(server, tmp_path)
    assert (tmp_path / "LaMP_4/manifest.json").exists()


def test_a_missing_file_an_error_page_and_no_network_are_data_missing(server, tmp_path):
    with pytest.raises(DataMissing, match=r"train_outputs.json answered 404"):
        get(server, tmp_path, parts=["train"])
    server.files["/LaMP_4/dev/dev_outputs.json"] = b"<html>please log in</html>"
    with pytest.raises(DataMissing, match="sent no JSON"):
        get(server, tmp_path)
    with pytest.raises(DataMissing, match=r"cannot reach http://127.0.0.1:9") as caught:
        download.get("lamp4", dest=tmp_path, progress=False, base_url="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_at_once_and_not_taken_for_the_network(server, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "LaMP_4/dev").mkdir(parents=True)
    (tmp_path / "LaMP_4/dev/dev_outputs.json.part").symlink_to("/dev/full")
    with pytest.raises(DataMissing, match=r"cannot write .*dev_outputs.json.part \(No space left on device\)"):
        get(server, tmp_path)
    assert len(server.seen) == 1


def test_the_command_fetches_all_public_parts_and_prints_the_folder(server, tmp_path, monkeypatch, capsys):
    for part in ("train", "test"):
        server.files[f"/LaMP_4/{part}/{part}_questions.json"] = FILES["/LaMP_4/dev/dev_questions.json"]
    server.files["/LaMP_4/train/train_outputs.json"] = FILES["/LaMP_4/dev/dev_outputs.json"]
    monkeypatch.setattr(download, "BASE_URL", server.url)

    def harness(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["harness", *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert harness("data", "get", "lamp4", "--split", "user", "--dest", str(tmp_path)) == 0
    assert capsys.readouterr().out == f"{tmp_path}/LaMP_4\n"
    manifest = json.loads((tmp_path / "LaMP_4/manifest.json").read_text())
    assert len(manifest["files"]) == 5
    assert manifest["source"] == f"{server.url}/LaMP_4"
    assert len(Lamp4(data=str(tmp_path)).train_items()) == 99
    assert harness("data", "get", "lamp6") == 4
    assert "Avocado" in capsys.readouterr().err
    assert harness("data", "get", "lamp4", "--dest", str(tmp_path), "--split", "tiem") == 2
    server.files.clear()
    assert harness("data", "get", "lamp5", "--dest", str(tmp_path)) == 4
    assert "lamp-benchmark.github.io/download" in " ".join(capsys.readouterr().err.split())


def test_test_golds_are_not_asked_for(server, tmp_path):
    server.files["/time/LaMP_4/test/test_questions.json"] = b"[]"
    folder = get(server, tmp_path, parts=["test"], split="time")
    assert folder == tmp_path / "time/LaMP_4"
    assert [path for path, _ in server.seen] == ["/time/LaMP_4/test/test_questions.json"]


@pytest.mark.parametrize(("task", "split", "folder"), [("lamp2m", "user", "LaMP_2/new"), ("lamp2n", "user", "LaMP_2"),
                                                       ("lamp2m", "time", "time/LaMP_2/new")])  # fmt: skip
def test_the_two_lamp2_tasks_have_their_own_addresses(task, split, folder):
    assert download._folder(task, split) == folder


def test_bars_are_drawn_on_stderr_only(server, tmp_path, capsys):
    get(server, tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "LaMP_4/dev/dev_questions.json" in err


def test_requests_that_cannot_be_met_say_why(tmp_path):
    with pytest.raises(DataMissing, match=r"Avocado.*LDC"):
        download.get("lamp6", dest=tmp_path)
    with pytest.raises(UsageError, match="did you mean 'lamp4'"):
        download.get("lanp4", dest=tmp_path)
    with pytest.raises(UsageError, match="unknown split 'tiem'"):
        download.get("lamp4", split="tiem", dest=tmp_path)
    with pytest.raises(UsageError, match="unknown part 'deb'"):
        download.get("lamp4", parts=["deb"], dest=tmp_path)
    with pytest.raises(UsageError, match="no time split"):
        download.get("lamp2n", split="time", dest=tmp_path)
