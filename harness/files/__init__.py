"""Everything that is written to disk: whole or not at all, held by one process, under names that no id can choose.

replace_file(path, content)     a reader sees the old file or the new one
replacing_file(path)            the same for a file that something else writes
replacing_folder(path)          the same for a folder of files
Lock.take(path)                 nobody else writes here until it is released
file_name(id), names_of(ids)    a name for the file or folder of a user or an item
"""

from harness.files.locks import Lock, waiting
from harness.files.names import NAMES, file_name, id_of, named, names_of, write_names
from harness.files.whole import append, replace_file, replacing_file, replacing_folder, writing

__all__ = [
    "NAMES",
    "Lock",
    "append",
    "file_name",
    "id_of",
    "named",
    "names_of",
    "replace_file",
    "replacing_file",
    "replacing_folder",
    "waiting",
    "write_names",
    "writing",
]
