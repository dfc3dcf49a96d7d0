"""Files that other people and other tools wrote, damaged in every way: each is read or refused in one line.

A valid file is taken apart and one or more of its parts is replaced by what does not belong there. Whatever comes of it, no
error but the harness's own leaves the reader, its message is one line, and its exit code is a documented one.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from harness.engine.model import LanguageModel
from harness.engine.weights.adapters import read_adapter
from harness.errors import HarnessError
from harness.fit.heads import read_heads
from harness.fit.vector_files import as_fitted
from harness.methods.lora_p import LoRAP
from harness.plugins.registry import task_class
from harness.publish import leaderboard
from harness.publish.show import show_runs
from harness.records.store import find_runs, read_record, read_samples
from harness.run.contract import random_lm
from harness.run.recompute import recompute
from harness.statistics.compare import compare
from harness.task import Selection
from harness.tiny import lamp_mini

RESULTS = Path(__file__).resolve().parents[2] / "results"
DOCUMENTED = {1, 2, 3, 4, 5}
EXAMPLES = 60
"""A kind of file; there are seven."""

quick = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)

ODD: list[Any] = [
    None, True, 0, -1, 1.5, 1e308, 2**70, "", "x", "é", "\ud83d", "\x1b[31m", "../..", "a" * 300, "nan", [], {}, [[]], [None],
    {"": None}, ["x", 1], {"a": {"b": []}}, "1", "-1", [1, 2, 3], float("nan"), float("inf"),
]  # fmt: skip
RAW = [
    b"", b"null", b"{", b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe", b"\xef\xbb\xbf{}", b"1e999", b'"\\ud800"', b'{"a":1,"a":2}',
    b"NaN", b"9" * 5000, b"[]", b"{}", b"\x00" * 9, b'{"a": [NaN]}',
]  # fmt: skip
"""Whole files that are no such file."""


@st.composite
def damaged(draw: st.DrawFn, content: Any) -> bytes:
    """The JSON of `content` with one to three parts replaced, removed or doubled; or no such JSON at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(RAW))
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "remove", "double", "nest"]))
        if how == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif how == "remove":
            del holder[key]
        elif how == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = [holder[key]]
        if not list(_places(content)):
            break
    text = json.dumps(content).encode()
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 19)) == 0 else text


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [content]
    while waiting:
        value = waiting.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
        for key in keys:
            yield value, key
            waiting.append(value[key])


def refused_or_read(act: Callable[[], object]) -> str:
    """The line that says why it was refused; empty where it was read."""
    line = ""
    try:
        act()
    except HarnessError as error:
        line = str(error)
        documented = error.exit_code in DOCUMENTED
    assert not line or (documented and line.strip() and len(line) < 2000), line
    return line


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return random_lm(dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


QUESTIONS, GOLDS = lamp_mini.load("lamp4", "dev")
QUESTIONS, GOLDS = [{**q, "profile": q["profile"][:2]} for q in QUESTIONS[:3]], GOLDS[:3]


@seed(1)
@quick
@given(questions=damaged(QUESTIONS), golds=st.just(None) | damaged({"task": "LaMP_4", "golds": GOLDS}))
def test_lamp_files(folder: Path, questions: bytes, golds: bytes | None) -> None:
    place = folder / "lamp" / "LaMP_4"
    place.mkdir(parents=True, exist_ok=True)
    (place / "dev_questions.json").write_bytes(questions)
    (place / "dev_outputs.json").write_bytes(golds or json.dumps({"task": "LaMP_4", "golds": GOLDS}).encode())

    def read() -> None:
        for item in task_class("lamp4")(str(folder / "lamp")).items(Selection("dev")):  # type: ignore[call-arg]
            item.example.prompt(item.example.user.history).render()
            list(item.example.user.pairs)

    refused_or_read(read)


TRAIT = {
    "instruction": [{"pos": "Be kind.", "neg": "Be unkind."}] * 2,
    "questions": ["How are you?", "And you?"],
    "eval_questions": ["What now?", "What then?"],
    "eval_prompt": "Rate {question} and {answer}.",
}


@seed(2)
@quick
@given(content=damaged(TRAIT))
def test_trait_files(folder: Path, content: bytes) -> None:
    (folder / "kind.json").write_bytes(content)

    def read() -> None:
        task = task_class(f"persona:{folder / 'kind.json'}")()  # type: ignore[call-arg]
        for split in ("train", "dev"):
            assert task.items(Selection(split))

    refused_or_read(read)


HEADS = [
    {f"{layer}-{head}": [0.5, 0.25 * head] for layer in range(2) for head in range(2)},
    {"ranked_heads": [{"layer": n // 2, "head": n % 2, "avg_pcs": 1 / (n + 1)} for n in range(4)]},
    {"preference_heads": [[1, 1], [0, 0]]},
]


@seed(3)
@quick
@given(content=st.sampled_from(HEADS).flatmap(damaged) | st.just(b'{"preference_heads": [[1e400, 0]]}'))
def test_head_files(folder: Path, content: bytes) -> None:
    (folder / "heads.json").write_bytes(content)
    refused_or_read(lambda: read_heads(str(folder / "heads.json"), 2, 2))


def _vector_files(path: Path, width: int, layers: int, draw: Callable[[st.SearchStrategy], Any]) -> Path:
    """A file of a random format whose tensors may be of odd types, shapes and values."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize
    from safetensors.torch import save_file

    def tensor() -> Any:
        size = draw(st.sampled_from([(width,), (width,), (width,), (width + 1,), (0,), (), (2, width), (1, width)]))
        value = torch.ones(size)
        value = value * draw(st.sampled_from([1.0, 1.0, float("nan"), float("inf"), 1e38]))
        kind = draw(
            st.sampled_from(["float32", "float32", "float16", "bfloat16", "float64", "int64", "bool", "complex64"])
        )
        return value.to(getattr(torch, kind))

    form = draw(st.sampled_from(["ours", "persona", "steered", "gguf", "garbage"]))
    if form == "ours":
        names = draw(
            st.lists(
                st.sampled_from(
                    ["block.0", "block.1", "neutral.0", "residual_norm.0", "block.x", "block.-1", "y", "block.99"]
                ),
                max_size=3,
                unique=True,
            )
        )
        about = {"index_base": 0, "trait": "calm", "op": "add", "site": "block_out", "n": [1, 2]}
        said = draw(st.just(json.dumps(about).encode()) | damaged(about)).decode("utf-8", "replace")
        path = path.with_suffix(".safetensors")
        save_file({name: tensor().contiguous() for name in names}, path, metadata={"harness.vectors": said})
    elif form == "persona":
        rows = torch.ones(draw(st.sampled_from([(layers + 1, width), (layers + 2, width), (3, 1), (0, 0), (2,)])))
        rows = rows * draw(st.sampled_from([1.0, float("nan")]))
        path = path.with_suffix(".pt")
        torch.save(draw(st.sampled_from([rows, rows.to_sparse(), rows.to(torch.int8), [rows], None, "x", {}])), path)
    elif form == "steered":
        steer = {
            "steering_vector": tensor(),
            "steering_coefficient": draw(st.sampled_from([1.0, "x", None])),
            "action": "add",
        }
        steer |= draw(st.sampled_from([{}, {"action": "clamp"}, {"steering_vector": [1]}, {"head_index": 1}]))
        path = path.with_suffix(".pt")
        torch.save({draw(st.sampled_from(["layers.0", "layers.99", "x", "layers.-1"])): steer}, path)
    elif form == "gguf":
        path = path.with_suffix(".gguf")
        writer = GGUFWriter(path, draw(st.sampled_from(["controlvector", "llama", "steeringvector"])))
        for name in draw(st.lists(st.sampled_from(["direction.1", "direction.x", "y"]), max_size=2, unique=True)):
            kind = draw(st.sampled_from(["F32", "F16", "BF16", "Q8_0"]))
            numbers = np.ones(draw(st.sampled_from([width, 32, 64])), np.float32)
            if kind in ("BF16", "Q8_0") and len(numbers) % 32 == 0:
                raw = getattr(GGMLQuantizationType, kind)
                writer.add_tensor(name, quantize(numbers, raw), raw_dtype=raw)
            else:
                writer.add_tensor(name, numbers.astype(np.float16 if kind == "F16" else np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        path = path.with_suffix(draw(st.sampled_from([".pt", ".gguf", ".safetensors", ".txt"])))
        path.write_bytes(draw(st.sampled_from(RAW) | st.binary(max_size=99)))
    return path


@seed(4)
@quick
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_vector_files(folder: Path, lm: LanguageModel, data: st.DataObject) -> None:
    path = _vector_files(folder / "vectors", lm.sites.width, lm.sites.layers, data.draw)
    refused_or_read(lambda: as_fitted([str(path)], lm))


ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "bias": "none",
}


@seed(5)
@quick
@given(config=st.just(json.dumps(ADAPTER).encode()) | damaged(ADAPTER), data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_adapter_folders(folder: Path, lm: LanguageModel, config: bytes, data: st.DataObject) -> None:
    from safetensors.torch import save_file

    place = folder / "adapter"
    place.mkdir(exist_ok=True)
    (place / "adapter_config.json").write_bytes(config)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    wide = lm.sites.width
    sizes = st.sampled_from([(2, wide), (2, wide), (0, wide), (wide,), (), (3, wide), (2, 1), (1, 2, wide)])
    tensors = {
        f"{module}.lora_A.weight": torch.ones(data.draw(sizes)),
        f"{module}.lora_B.weight": torch.ones(data.draw(st.sampled_from([(wide, 2), (wide, 0), (wide, 3), (2,)]))),
    }
    if data.draw(st.integers(0, 5)) == 0:
        (place / "adapter_model.safetensors").write_bytes(data.draw(st.binary(max_size=64)))
    else:
        scale = data.draw(st.sampled_from([1.0, float("nan")]))
        kind = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int64]))
        save_file(
            {name: (tensor * scale).to(kind) for name, tensor in tensors.items()}, place / "adapter_model.safetensors"
        )
    refused_or_read(lambda: read_adapter(place, lm))
    refused_or_read(lambda: LoRAP(adapters=str(place)).options())


@pytest.fixture(scope="module")
def records(folder: Path) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """A folder of two records with samples, of which the first is damaged; what run.json and samples.jsonl held."""
    root = folder / "results"
    sources = [
        record.folder for record in find_runs(RESULTS, task="lamp2m") if (record.folder / "samples.jsonl").is_file()
    ]
    for source in sources[:2]:
        shutil.copytree(source, root / source.relative_to(RESULTS))
        samples = (source / "samples.jsonl").read_bytes().splitlines(keepends=True)[:3]
        content = json.loads((source / "run.json").read_bytes())
        content["batches"], content["batch_costs"] = [[json.loads(line)["id"] for line in samples]], {}
        (root / source.relative_to(RESULTS) / "run.json").write_text(json.dumps(content))
        (root / source.relative_to(RESULTS) / "samples.jsonl").write_bytes(b"".join(samples))
    first = root / sources[0].relative_to(RESULTS)
    run = json.loads((first / "run.json").read_bytes())
    return first, run, [json.loads(line) for line in (first / "samples.jsonl").read_bytes().splitlines()]


def _use(first: Path, capsys: Any = None) -> None:
    root = first.parents[2]
    other = next(path.parent for path in root.glob("*/*/*/run.json") if path.parent != first)
    refused_or_read(lambda: leaderboard.render([root]))
    refused_or_read(lambda: show_runs([first, other], 2))
    refused_or_read(lambda: compare([first, other]))
    refused_or_read(lambda: list(recompute(root, write=False)))


@seed(6)
@quick
@given(data=st.data())
def test_run_json(records: tuple[Path, dict[str, Any], list[dict[str, Any]]], data: st.DataObject) -> None:
    first, run, samples = records
    (first / "samples.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    (first / "run.json").write_bytes(data.draw(damaged(run)))
    refused_or_read(lambda: read_record(first))
    _use(first)


@seed(7)
@quick
@given(data=st.data())
def test_samples_jsonl(records: tuple[Path, dict[str, Any], list[dict[str, Any]]], data: st.DataObject) -> None:
    first, run, samples = records
    (first / "run.json").write_text(json.dumps(run))
    lines = [data.draw(damaged(sample)).replace(b"\n", b" ") for sample in samples]
    (first / "samples.jsonl").write_bytes(b"\n".join(lines) + data.draw(st.sampled_from([b"\n", b""])))
    refused_or_read(lambda: read_samples(first))
    _use(first)
