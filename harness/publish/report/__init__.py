"""The report page: a folder of static files that opens from the disk, `harness report --output_path report/`.

`index.html` loads what every view needs (`data/*.js`); samples, queries with their histories, and full records are one script
file each, loaded when they are looked at. Script files, since a page from the disk may fetch nothing. Nothing in them is
code of the data's making: each is one call, `report.put(name, JSON)`, and the page shows data as text only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from harness.errors import DataMissing, HarnessError, UsageError
from harness.files import replacing_folder
from harness.publish.report import by_user, content, items
from harness.publish.report.items import Group, groups, read_items
from harness.records.schema import json_value
from harness.records.select import Places, said
from harness.records.store import find_runs, models_first_to_last, read_samples

PAGE = (
    "index.html",
    "style.css",
    "page.js",
    "leaderboard.js",
    "samples.js",
    "tables.js",
    "heads.js",
    "run.js",
    "app.js",
)


def write(results: Places, output: Path, data: Sequence[str] = ()) -> Path:
    """The page over the records in `results`, written to the folder `output`; its index.html.

    `data` are folders where the tasks' files may be, for queries and histories that are not in the records. Raises DataMissing where
    there is no record, UsageError where `output` holds something else than a report.
    """
    runs = [run for run in find_runs(results) if run.folder is not None]
    if not runs:
        raise DataMissing(f"no records in {said(results)}; 'harness run' makes them")
    if data and not any(map(items.reads_folder, runs)):
        names = ", ".join(dict.fromkeys(run.config.task.name for run in runs))
        raise UsageError(f"--data {data[0]}: {names} reads no folder of files; leave it out")
    order = models_first_to_last(runs)
    runs.sort(key=lambda run: order.index(run.config.model.name))
    _check(output)
    samples = {items.key(run): read_samples(run.folder) for run in runs if run.folder}
    found = groups(runs, samples)
    with replacing_folder(output.resolve()) as draft:
        folder = draft / "data"
        _put(folder, "runs", content.overview(runs, results, found))
        _put(folder, "tables", content.tables(results))
        pictures = draft / "figures"
        _put(folder, "figures", [*by_user.figures(found, data, pictures), *content.figures(results, pictures)])
        for run in runs:
            key = items.key(run)
            _put(folder, f"records/{key}", content.record(run))
            if samples[key]:
                _put(folder, f"samples/{key}", content.answers(samples[key]))
        for group in found:
            _put(folder, f"items/{group.name}", _items(group, data))
        page = files(__package__) / "page"
        for name in PAGE:
            (draft / name).write_bytes((page / name).read_bytes())
        _keep_others(output, draft)
    return output / "index.html"


def _items(group: Group, data: Sequence[str]) -> dict[str, Any]:
    try:
        return read_items(group, data)
    except HarnessError as error:
        return {"why_no_text": str(error), "items": group.targets()}


def _check(output: Path) -> None:
    """Raises UsageError where a report would take the place of something else."""
    there = output.is_dir() and any(output.iterdir())
    if (there and not (output / "data" / "runs.js").is_file()) or (output.exists() and not output.is_dir()):
        raise UsageError(f"{output} holds something else than a report; give --output_path another folder, or empty it")


def _keep_others(output: Path, draft: Path) -> None:
    """What somebody put beside a report stays there."""
    for there in output.iterdir() if output.is_dir() else ():
        if there.name in ("data", "figures", *PAGE):
            continue
        if there.is_dir() and not there.is_symlink():
            shutil.copytree(there, draft / there.name, symlinks=True)
        else:
            shutil.copy2(there, draft / there.name, follow_symlinks=False)


def _put(folder: Path, name: str, value: Any) -> None:
    """A script file that hands `value` to the page under `name`.

    JSON in ASCII is a JavaScript literal: what is not, such as U+2028, is escaped. So is `<`, lest a reader of HTML ever see a tag.
    """
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(json_value(value), separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(f"report.put({json.dumps(name)},{text});\n", encoding="ascii")
