"""Names on the command line -> classes and models. Greppable tables; nothing is imported until it is used."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TypeVar

from harness.errors import DataMissing, UsageError, did_you_mean
from harness.files.rows import HUB, SUFFIXES
from harness.method import Method
from harness.methods import METHODS
from harness.plugins.declared import check_declared
from harness.task import Task
from harness.tasks import TASKS

T = TypeVar("T")

MODELS: Mapping[str, str] = {
    "tiny": "",  # embedded: harness/tiny/model
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "qwen2-7b": "Qwen/Qwen2-7B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "vicuna-13b": "lmsys/vicuna-13b-v1.5",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "gemma3-270m": "google/gemma-3-270m-it",
}
"""Alias -> hub id. An alias names the row of the papers' tables."""

GGUF = ".gguf"
FILES = frozenset(suffix.lstrip(".") for suffix in SUFFIXES)
"""Kinds of files of users: `csv:mine.csv` is `users:mine.csv`."""


@dataclass(frozen=True)
class ModelRow:
    """Which model to load, and under which name its results stand."""

    name: str
    """Alias, hub id, or the name of a local folder or GGUF file."""
    source: str
    """Hub id, folder or GGUF file."""
    local: bool

    @property
    def hub_id(self) -> str:
        """The hub id behind an alias, also where the weights are local; else the name."""
        return MODELS.get(self.name) or self.name

    @property
    def gguf(self) -> bool:
        return self.local and self.source.endswith(GGUF)


def model_row(name: str, path: str | None = None) -> ModelRow:
    """`name` is an alias, a hub id, a folder or a GGUF file; `path` gives a name local weights and keeps its table row."""
    if "://" in name or "://" in (path or ""):
        raise UsageError(f"{path or name} is a URL; give an alias, a hub id like 'org/name', or a folder that is here")
    if name.startswith("openai/") and path is None:
        raise UsageError(
            f"--model {name} is a model behind a server, and none is named; give one that runs here: an alias, another hub "
            "id, or --model_path with a folder. A server's model can judge: --judge openai/<model>"
        )
    if path is None and os.path.isfile(name) and not name.endswith(GGUF):
        raise UsageError(f"model {name} is a file; give the folder that holds config.json, or a .gguf file")
    if path is not None:
        if not (os.path.isdir(path) or _is_gguf(path)):
            raise DataMissing(
                f"--model_path {path} is no folder and no GGUF file; give the folder that holds config.json, or a .gguf file"
            )
        return ModelRow(name, _weights_in(path), local=True)
    if name == "tiny":
        from harness.tiny import MODEL_DIR

        return ModelRow("tiny", str(MODEL_DIR), local=True)
    if name in MODELS:
        return ModelRow(name, MODELS[name], local=False)
    if _is_gguf(name) or (os.path.isdir(name) and _weights_in(name) != name):
        file = _weights_in(name)
        return ModelRow(Path(file).stem.lower(), file, local=True)
    if os.path.isdir(name):
        folder = Path(name).resolve()
        generic = folder.name in {"hf", "model", "weights", "checkpoint"}
        # the folder as it was given: a record need not hold where it lies on this machine
        return ModelRow(folder.parent.name if generic else folder.name, name, local=True)
    if name.startswith((".", "/", "~")) or name.endswith(GGUF):
        raise DataMissing(f"model {name} does not exist; give the folder that holds config.json, or a .gguf file")
    if name.count("/") == 1:
        return ModelRow(name, name, local=False)
    raise UsageError(
        f"unknown model {name!r}{did_you_mean(name, MODELS)} give an alias ('harness list models' shows "
        f"all {len(MODELS)}), a hub id like 'org/name', a folder or a .gguf file"
    )


def _is_gguf(path: str) -> bool:
    return path.endswith(GGUF) and os.path.isfile(path)


def _weights_in(path: str) -> str:
    """The path itself, or the one GGUF file of a folder that holds no other weights."""
    folder = Path(path)
    if not os.path.isdir(path) or any(next(folder.glob(kind), None) for kind in ("*.safetensors", "*.bin")):
        return path
    files = sorted(folder.glob(f"*{GGUF}"))
    if len(files) > 1:
        raise UsageError(
            f"{path} holds {len(files)} GGUF files ({', '.join(f.name for f in files[:5])}); name one of them"
        )
    return str(files[0]) if files else path


def method_class(name: str) -> type[Method]:
    """The class behind a registered name or `file.py:Class`."""
    if name.partition(":")[0].endswith(".py"):
        return checked_method(from_file(name, Method), name)
    if name not in METHODS:
        raise UsageError(
            f"unknown method {name!r}{did_you_mean(name, METHODS)} 'harness list methods' shows all {len(METHODS)}"
        )
    return _load(METHODS[name])


def checked_method(cls: type[Method], whose: str) -> type[Method]:
    """The class, if options can be given to it. Raises UsageError where it is abstract or no dataclass of its options."""
    where = f"{whose}: class {cls.__name__}"
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise UsageError(
            f"{where} lacks {', '.join(missing)}; a method has at least plan(self, example, shared, personal)"
        )
    known = cls.__dataclass_fields__
    for base in cls.__mro__[: cls.__mro__.index(Method)]:
        if "__dataclass_params__" in vars(base):
            continue
        named = [n for n, hint in vars(base).get("__annotations__", {}).items() if "ClassVar" not in str(hint)]
        lost = [name for name in named if name not in known]
        if lost or "__init__" in vars(base):
            what = f"options {', '.join(lost)} would be lost" if lost else "a constructor of its own"
            raise UsageError(
                f"{where} is no dataclass: {what}; put @dataclass(frozen=True) before class {base.__name__}"
            )
    bare = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    if bare:
        raise UsageError(f"{where}: option {bare[0]!r} has no default; give it one, as in {bare[0]}: float = 1.0")
    return cls


@dataclass(frozen=True)
class MethodRow:
    """A method as it was named on the command line."""

    name: str
    """How it is called in records: its registered name, or what it would be registered as (`_named`)."""
    cls: type[Method]
    source: str | None = None
    """Hash of the file of a method that is not registered."""
    made: Method | None = None
    """The method itself, where it was given and not named."""


def method_row(given: str | Method) -> MethodRow:
    """`given` is a registered name, `file.py:Class`, or a method that is already made."""
    if isinstance(given, Method):
        return _row_of(given)
    cls = method_class(given)
    if given in METHODS:
        return MethodRow(given, cls)
    file = Path(given.partition(":")[0])
    return MethodRow(_named(cls, file), cls, source_of(file))


def _row_of(method: Method) -> MethodRow:
    cls = type(method)
    for name, target in METHODS.items():
        if target == f"{cls.__module__}:{cls.__qualname__}":
            return MethodRow(name, cls, made=method)
    try:
        file = Path(inspect.getsourcefile(cls) or "")
        source = (
            source_of(file) if file.is_file() else _digest(inspect.getsource(cls).encode())
        )  # a notebook's cell is no file
    except (OSError, TypeError) as error:
        raise UsageError(
            f"the source of {cls.__name__} cannot be read, and a record names a method by it; put it into a .py file"
        ) from error
    return MethodRow(_named(cls, file), cls, source, method)


def _named(cls: type[Method], file: Path) -> str:
    """The class's name in lower case, words parted by `_`: as its file has them where the file is named after the class.

    So `RecencyContrast` is recency_contrast, and `LoRAC` of lora_c.py is lora_c, outside the repository as in it.
    """
    if file.stem.replace("_", "") == cls.__name__.lower():
        return file.stem
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()


def source_of(file: Path) -> str:
    """Hash of a file of somebody's code and of the modules beside it that it imports: what decides its numbers."""
    first = file.resolve()
    read: dict[Path, bytes] = {}
    waiting = [first]
    while waiting:
        path = waiting.pop()
        if path not in read:
            read[path] = path.read_bytes()
            waiting += _beside({path.parent, first.parent}, read[path])
    others = [hashlib.sha256(read[path]).digest() for path in sorted(read.keys() - {first})]
    return _digest(b"\0".join([read[first], *others]))


def _beside(folders: Collection[Path], content: bytes) -> Iterator[Path]:
    """The files in these folders, or below them, of the modules that the code imports; not the harness's own."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):  # importing it says what is wrong
        return
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            start = [node.module] if node.module else []
            names = [*start, *(".".join([*start, alias.name]) for alias in node.names)]
        for parts in (name.split(".") for name in names if name.partition(".")[0] != "harness"):
            for folder in folders:
                for last in range(1, len(parts) + 1):
                    place = folder.joinpath(*parts[:last])
                    found = (place.with_name(f"{place.name}.py"), place / "__init__.py")
                    yield from (path.resolve() for path in found if path.is_file())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def task_name(name: str) -> str:
    """The registered spelling: `lamp4` for `LaMP-4` and `LaMP_4`; a member of a family stays as it is: `lm_eval:piqa`."""
    family, colon, member = name.partition(":")
    if family.endswith(".py"):
        return name
    if family in FILES or f"{family}:" == HUB or (name.endswith(SUFFIXES) and not colon):  # users, said shortly
        return f"users:{member if family in FILES else name}"
    plain = family.lower().replace("-", "").replace("_", "")
    for registered in TASKS:
        if plain == registered.lower().replace("-", "").replace("_", ""):
            return f"{registered}{colon}{member}"
    if plain == "lamp2":
        raise UsageError("'lamp2' is two tasks: lamp2m (movie tags) and lamp2n (news categories); name one")
    raise UsageError(f"unknown task {name!r}{did_you_mean(plain, TASKS)} 'harness list tasks' shows all {len(TASKS)}")


def task_class(name: str) -> type[Task]:
    """The class behind a registered name, a member of a family, or `file.py:Class`."""
    if name.partition(":")[0].endswith(".py"):
        theirs = from_file(name, Task)
        check_declared(theirs, f"task {name!r}")
        return theirs
    family, colon, member = task_name(name).partition(":")
    cls: type[Task] = _load(TASKS[family])
    return cls.member(member) if colon else cls


def task_source(name: str) -> str | None:
    """Hash of the file of a task that is not registered."""
    file = name.partition(":")[0]
    return source_of(Path(file)) if file.endswith(".py") else None


def is_task(given: str) -> bool:
    """Whether it names a task and no method: a registered one, a member of a family, or a file that defines one."""
    file = given.partition(":")[0]
    try:
        return given not in METHODS and issubclass(
            from_file(given, Task) if file.endswith(".py") else task_class(given), Task
        )
    except UsageError:
        return False


def from_file(spec: str, base: type[T]) -> type[T]:
    """The subclass of `base` in `file.py`, or the named one in `file.py:Class`."""
    file, _, wanted = spec.partition(":")
    path = Path(file)
    if not os.path.isfile(file):
        raise UsageError(f"file {file!r} does not exist; give the path of a .py file, as in ./mine.py:Mine")
    module_spec = importlib.util.spec_from_file_location(f"file {path}", path)  # no name that a module may have
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except SystemExit as stop:
        raise UsageError(
            f"{file} ends the program when it is imported (sys.exit({stop.code})); put that under if __name__ == '__main__'"
        ) from stop
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = error.lineno if isinstance(error, SyntaxError) else where.lineno
        raise UsageError(
            f"{file} cannot be imported: {type(error).__name__}: {error} ({where.filename}, line {line})"
        ) from error
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    }
    if wanted:
        if wanted not in found:
            raise UsageError(f"{file} has no {base.__name__} called {wanted!r}; it has: {', '.join(found) or 'none'}")
        return found[wanted]
    if not found:
        raise UsageError(f"{file} defines no subclass of {base.__name__}")
    if len(found) > 1:
        raise UsageError(f"{file} defines {', '.join(found)}; name one, as in {file}:{next(iter(found))}")
    return next(iter(found.values()))


def _load(target: str) -> type:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
