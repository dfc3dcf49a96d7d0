"""GGUF files: weights, tokenizer and chat template in one file, as llama.cpp keeps them.

transformers reads the file (`gguf_file=`); its weights are dequantised to float32 once and kept as a folder that loads
like any other, in $HARNESS_CACHE/gguf, named by the file's hash and the version of the reader. What transformers leaves
out of such a file is put right here:

    BOS           a file may name one and say that no text begins with it (Qwen): then the folder's tokenizer has none
    end tokens    eos, eot and eom of the file, and the token its chat template writes after an answer
    rope          files of Llama 3.1 and later keep their frequencies as a tensor, which transformers skips

A tensor or a setting that nothing would read is refused: the model would be another one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError

from harness.engine.sites import check_config
from harness.engine.weights.identity import gguf_folder
from harness.errors import DataMissing, HarnessError
from harness.files import replacing_folder, waiting
from harness.files.user_cache import caching

_SHARD = "4GB"
_ROPE = "rope_freqs.weight"
_LLAMA3_FACTORS = (8.0, 32.0)
"""Llama 3.1's rope factor, and that of 3.2."""


class _Said(NamedTuple):
    """What the file says about itself and transformers does not ask."""

    tensors: tuple[str, ...]
    adds_bos: bool
    ends: tuple[int, ...]
    rope: torch.Tensor | None


def folder_of(file: Path) -> Path:
    """The folder of float32 weights made from a GGUF file; made now where there is none yet.

    Raises UnsupportedModel for an architecture without a row in sites.py, DataMissing for a file that cannot be read or
    holds what transformers does not read.
    """
    target = gguf_folder(file)
    if target.is_dir():
        return target
    with caching(target.parent):
        locks = target.parent / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with waiting(locks / target.name):  # commands side by side convert a file once
            if not target.is_dir():
                with replacing_folder(target, keep=True) as made:
                    _convert(file, made)
    return target


def _convert(file: Path, folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    try:
        with contextlib.redirect_stderr(io.StringIO()), _one_reader():  # no progress bars
            said = _read_header(file)
            config, tokenizer, model = _read(file, said)
    except HarnessError:
        raise
    except Exception as error:  # numpy's, gguf's and transformers' own for a file that is damaged or unknown to them
        line = (str(error).strip().splitlines() or [""])[0][:160]
        raise DataMissing(
            f"GGUF file {file} cannot be read ({type(error).__name__}: {line}); fetch it again, or give a folder with the "
            "model's config.json, tokenizer files and *.safetensors weights"
        ) from error
    _settle_bos(tokenizer, said)
    ends = sorted({*said.ends, *_turn_ends(tokenizer)})
    generation = model.generation_config
    generation.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
    for part in (config, generation):
        part.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        del weights[f"{head}.weight"]
    save_torch_state_dict(weights, folder, max_shard_size=_SHARD, metadata={"format": "pt"})


@contextlib.contextmanager
def _one_reader() -> Iterator[None]:
    """Within the context a file is parsed once: transformers does it again for its config, tokenizer and weights."""
    import gguf

    kept = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(kept)  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = kept  # type: ignore[misc]


def _read(file: Path, said: _Said) -> tuple[Any, Any, Any]:
    """Config, tokenizer and model of float32 weights. Raises what the libraries raise."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": str(file.resolve())}
    config: Any = AutoConfig.from_pretrained(**where)
    check_config(config)  # before gigabytes of weights
    if said.rope is not None:
        config.rope_parameters = _llama3_rope(file, said.rope, config)
    tokenizer: Any = AutoTokenizer.from_pretrained(**where)
    whole = GgufConfig(dequantize=True)  # else weights may stay in blocks, where a kernel is installed
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **where, config=config, dtype=torch.float32, quantization_config=whole, output_loading_info=True
    )
    model, report = loaded
    absent = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if absent:
        raise DataMissing(f"GGUF file {file} lacks {len(absent)} of its model's tensors, first {absent[0]!r}")
    extra = len(said.tensors) - len(list(model.parameters()))
    if extra:
        raise DataMissing(
            f"GGUF file {file} holds {len(said.tensors)} tensors, and its model as transformers reads it has "
            f"{len(said.tensors) - extra}; without them it would be another model. Give a folder of *.safetensors weights"
        )
    kept = AutoConfig.for_model(
        **{name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    )
    kept.architectures, kept.dtype = [type(model).__name__], torch.float32
    return kept, tokenizer, model


def _read_header(file: Path) -> _Said:
    from gguf import GGUFReader

    reader = GGUFReader(str(file.resolve()))

    def value(name: str) -> Any:
        field = reader.fields.get(name)
        return None if field is None else field.contents()

    split = value("split.count")
    if split not in (None, 0, 1):
        raise DataMissing(
            f"{file} is one of {split} parts; join them first: llama-gguf-split --merge {file} WHOLE.gguf"
        )
    architecture = value("general.architecture")
    scaling = value(f"{architecture}.rope.scaling.type") or "none"
    stretched = value(f"{architecture}.rope.scaling.factor") or value(f"{architecture}.rope.scale_linear") or 1.0
    if scaling != "none" or stretched != 1.0:
        raise DataMissing(
            f"GGUF file {file} scales its positions ({scaling}, factor {stretched:g}), which transformers does not read from "
            "such a file; give a folder of *.safetensors weights"
        )
    ends = (value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    rope = next((torch.from_numpy(t.data.copy()) for t in reader.tensors if t.name == _ROPE), None)
    return _Said(
        tensors=tuple(tensor.name for tensor in reader.tensors if tensor.name != _ROPE),
        adds_bos=bool(value("tokenizer.ggml.add_bos_token") or value("tokenizer.ggml.model") == "llama"),
        ends=tuple(int(end) for end in ends if end is not None),
        rope=rope,
    )


def _llama3_rope(file: Path, factors: torch.Tensor, config: Any) -> dict[str, Any]:
    """The settings whose frequencies the file holds, divided out. Raises DataMissing where no known ones do."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    for factor in _LLAMA3_FACTORS:
        settings = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        settings |= {"original_max_position_embeddings": 8192, "rope_theta": theta}
        tried = copy.deepcopy(config)
        tried.rope_parameters = settings
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](tried, torch.device("cpu"))
        if torch.allclose((plain / found.double()), factors.double(), rtol=1e-4):
            return settings
    raise DataMissing(
        f"GGUF file {file} holds rope frequencies that are neither Llama 3.1's nor 3.2's; give a folder of *.safetensors weights"
    )


def _settle_bos(tokenizer: Any, said: _Said) -> None:
    """One BOS where the file or its template begins with it, and none where neither does."""
    bos = tokenizer.bos_token
    if bos is None:
        return
    if not (said.adds_bos or _rendered(tokenizer, _QUESTION, open_turn=True).startswith(bos)):
        tokenizer.bos_token = None
    elif said.adds_bos and tokenizer.encode("a")[:1] != [tokenizer.bos_token_id]:
        from tokenizers.processors import TemplateProcessing

        special = [(bos, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=special
        )


_QUESTION = [{"role": "user", "content": "question"}]
_ANSWERED = [*_QUESTION, {"role": "assistant", "content": "answer"}]


def _turn_ends(tokenizer: Any) -> Sequence[int]:
    """The special token the chat template writes after an answer; empty where there is none."""
    after = _rendered(tokenizer, _ANSWERED, open_turn=False).rpartition("answer")[2].strip()
    specials = sorted(tokenizer.added_tokens_encoder.items(), key=lambda pair: -len(pair[0]))
    return [number for token, number in specials if token and after.startswith(token)][:1]


def _rendered(tokenizer: Any, turns: Sequence[dict[str, str]], *, open_turn: bool) -> str:
    """Empty where there is no template, or it takes no such turns: what is wrong is said where it is used."""
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_turn))
    except (TemplateError, TypeError, ValueError):
        return ""
