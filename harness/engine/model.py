"""A language model as the engine sees it: prompts to token ids, token ids to logits. The only file that loads transformers.

Chat models get messages through their own template, base models the raw text; a prompt has exactly one BOS where the
tokenizer has one. Prompt ids and answer ids are tokenised apart and concatenated, never tokenised together.
"""

from __future__ import annotations

import contextlib
import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from harness.data import Joint, Prompt, Rendered
from harness.errors import ContextTooLong, DataMissing, HarnessError, UsageError
from harness.flops import Sizes
from harness.plan import Layout, LoRA
from harness.registry import MODELS, ModelRow
from harness.sites import Sites, family_of

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""accelerate's ways to spread a model over several devices."""

_TODAY = "26 Jul 2024"
"""What chat templates take for today: the day Llama 3.2's own falls back on."""

CHAT_TEMPLATES: Mapping[str, str] = {
    "lmsys/vicuna-13b-v1.5": "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. {% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "USER: {{ m['content'] }} {% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
}
"""By hub id: the format a chat model was trained with, where its own files hold no template."""


@dataclass(frozen=True)
class Encoded:
    """A rendered prompt as token ids."""

    ids: tuple[int, ...]
    text: str
    offsets: tuple[tuple[int, int], ...] = ()
    bos: bool = False

    def layout(self) -> Layout:
        return Layout(len(self.ids), self.bos, self.offsets, self.text)

    def without_first(self, count: int) -> Encoded:
        """Cut from the left, a BOS first of all; offsets still point into the whole text."""
        return Encoded(self.ids[count:], self.text, self.offsets[count:], self.bos and count == 0)


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt cut to the context, and what the cut cost."""

    encoded: Encoded
    items: int
    """History items left in the prompt."""
    dropped: int
    cut: int = 0
    """Tokens cut from the left of a `Joint` context that does not fit without any history."""


class Encoder:
    """Text to ids and back for one tokenizer."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_ids = frozenset(eos_ids) or frozenset(i for i in [tokenizer.eos_token_id] if i is not None)
        # sentencepiece tokenizers put a space before the first word by themselves
        first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
        self._adds_space = bool(first) and first[0].startswith("▁")
        self._whole = lru_cache(maxsize=4)(self._encode_whole)  # the choices of one question share their context

    @classmethod
    def load(
        cls, source: str | Path, eos_ids: Sequence[int] = (), *, template: str | None = None, local_only: bool = False
    ) -> Encoder:
        """The tokenizer of a folder or hub id, with its own chat template, else a .jinja file beside it, else `template`."""
        from transformers import AutoTokenizer, LlamaTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(str(source), local_files_only=local_only)
        scores = _bare_sentencepiece(tokenizer)
        if scores:
            tokenizer = LlamaTokenizer.from_pretrained(str(source), local_files_only=local_only)
            _merge_by_score(tokenizer, scores)
        if not tokenizer.chat_template:
            beside = sorted(Path(source).glob("*.jinja"))
            tokenizer.chat_template = beside[0].read_text(encoding="utf-8") if beside else template
        return cls(tokenizer, eos_ids)

    @property
    def end_id(self) -> int | None:
        """The token a finished answer ends with, where there is one."""
        own = self.tokenizer.eos_token_id
        return own if own is not None else min(self.eos_ids, default=None)

    def text(self, rendered: Rendered) -> str:
        """The string the model reads, without a BOS that the tokenizer would add."""
        if isinstance(rendered, Joint):
            text = self._conversation(rendered)
            return text.rstrip() if rendered.scored else text
        if isinstance(rendered, str):
            return rendered
        if not self.chat:
            return "\n\n".join(message.content for message in rendered)
        return self._template([{"role": m.role, "content": m.content} for m in rendered], open_turn=True)

    def encode(self, rendered: Rendered) -> Encoded:
        """Ids with exactly one BOS at the front where the tokenizer has one (none where it has none).

        A `Joint` context has the special tokens the tokenizer adds by itself, and the BOS, else the EOS, where it is empty.
        """
        text = self.text(rendered)
        if isinstance(rendered, Joint):
            return self._whole(text) if text else Encoded((self._prefix_id,), "", ((0, 0),), self.bos_id is not None)
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
        ids = list(out["input_ids"])
        offsets = [tuple(pair) for pair in out["offset_mapping"]] if fast else []
        bos = self.bos_id
        if bos is not None:
            while len(ids) > 1 and ids[0] == ids[1] == bos:
                ids, offsets = ids[1:], offsets[1:]
            if not ids or ids[0] != bos:
                ids, offsets = [bos, *ids], [(0, 0), *offsets] if fast else []
        return Encoded(tuple(ids), text, tuple(offsets), bos is not None)

    def answer(self, text: str, rendered: Rendered) -> tuple[int, ...]:
        """Ids of an answer that follows a prompt, no special tokens among them.

        Before it stands what the chat template writes there, or after raw text a space, where the text ends in none.
        After a `Joint` context: what the two tokenised together have beyond the context alone.
        """
        if isinstance(rendered, Joint):
            return self._continuation(rendered, text)
        if self.chat and not isinstance(rendered, str):
            lead = self._before_answer
        else:
            lead = "" if self.text(rendered)[-1:].isspace() else " "
        if not self._adds_space:
            return self._ids(lead + text)
        if lead.startswith(" "):
            return self._ids(lead[1:] + text)
        return self._ids(f"\n{lead}{text}")[len(self._ids("\n")) :]  # the space goes before the line break

    def _conversation(self, joint: Joint) -> str:
        if isinstance(joint.content, str):
            return joint.content
        if not self.chat:
            raise UsageError("this model has no chat template; leave the chat template out")
        turns = [{"role": m.role, "content": m.content} for m in joint.content]
        try:
            return self._template(turns, open_turn=joint.open_turn, go_on=not joint.open_turn)
        except TemplateError as error:
            raise UsageError(f"the model's chat template takes no such conversation ({error}); leave it out") from error

    def _continuation(self, context: Joint, text: str) -> tuple[int, ...]:
        before, head = self._conversation(context), self.text(context)
        text = before[len(head) :] + text
        if head:
            ids = self._whole(head + text).ids[len(self._whole(head).ids) :]
        else:
            ids = self._ids(text)
            ids = ids[1:] if ids[:1] == (self._prefix_id,) else ids
        if not ids:
            raise HarnessError(f"the continuation {text!r} adds no token to its context ({head[-40:]!r})")
        return ids

    @property
    def _prefix_id(self) -> int:
        """What lm-eval puts before a text without context."""
        return self.tokenizer.eos_token_id if self.bos_id is None else self.bos_id

    @cached_property
    def _prefix_text(self) -> str:
        return self.tokenizer.decode([self._prefix_id])

    def _encode_whole(self, text: str) -> Encoded:
        """Ids as the tokenizer makes them, its special tokens added unless the text begins with the BOS already."""
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        special = not text.startswith(self._prefix_text)
        out = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=fast)
        ids = tuple(out["input_ids"])
        offsets = tuple(tuple(pair) for pair in out["offset_mapping"]) if fast else ()
        return Encoded(ids, text, offsets, bool(ids) and ids[0] == self.bos_id)

    @cached_property
    def _before_answer(self) -> str:
        """White space the template puts between its generation prompt and an answer: a space in Llama 2 and Mistral."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        prompt, whole = self._template(turns[:1], open_turn=True), self._template(turns, open_turn=False)
        lead = whole.removeprefix(prompt).partition("answer")[0]
        return lead if whole.startswith(prompt) and lead.isspace() else ""

    def _template(self, turns: Sequence[Mapping[str, str]], *, open_turn: bool, go_on: bool = False) -> str:
        """The template's text, the same on every day (Llama 3.2's writes the date) and without thoughts (Qwen 3)."""
        return self.tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=open_turn,
            continue_final_message=go_on,
            date_string=_TODAY,
            enable_thinking=False,
        )

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def fit(self, prompt: Prompt, room: int) -> FittedPrompt:
        """The prompt within `room` tokens, history dropped item by item from the worst up; the input is never cut.

        A `Joint` context that is too long without any history is cut from the left; any other input raises ContextTooLong.
        """
        asked = len(prompt.items)

        @cache
        def encode(kept: int) -> Encoded:
            return self.encode(prompt.first(kept).render())

        kept = asked
        if len(encode(asked).ids) > room:  # a prompt grows with its items: bisect, a history may have thousands
            kept = bisect_left(range(asked), True, key=lambda n: len(encode(n + 1).ids) > room)
        encoded = encode(kept)
        cut = len(encoded.ids) - room
        if cut > 0 and room > 0 and isinstance(prompt.first(kept).render(), Joint):
            return FittedPrompt(encoded.without_first(cut), kept, asked - kept, cut)
        if cut > 0:
            raise ContextTooLong(
                f"the query alone has {len(encoded.ids)} tokens and the context has room for {room}; it is never cut"
            )
        return FittedPrompt(encoded, kept, asked - kept)


class LanguageModel:
    """A causal language model with its tokenizer, its sites and its limits."""

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        *,
        name: str = "model",
        source: str = "",
        revision: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        model.eval()
        self.model = model
        self.encoder = encoder
        self.name = name
        self.source = source
        self.revision = revision
        self.device = torch.device(device)
        self.sites = Sites(model)
        self.sizes = Sizes.of(model.config.to_dict())
        self.vocabulary: int = model.config.vocab_size
        self.max_length: int = model.config.max_position_embeddings
        self._head = model.get_output_embeddings()
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @classmethod
    def load(
        cls,
        row: ModelRow,
        *,
        dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
        device: str = "auto",
        device_map: str | None = None,
    ) -> LanguageModel:
        """The model of a registry row.

        Raises UnsupportedModel for an architecture without a row in sites.py, DataMissing where files are neither local
        nor cached and cannot be fetched, or do not hold this model.
        """
        where = _device(device)
        if device_map not in (None, *DEVICE_MAPS):
            raise UsageError(f"unknown device map {device_map!r}; allowed: {', '.join(DEVICE_MAPS)}")
        for local_only in (True, False):  # what is cached needs no network, and no wait for one that is down
            try:
                model, encoder, generation = _read(row, _dtype(dtype, where), device_map, local_only)
                break
            except (HarnessError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # each library has its own for a file that is absent or damaged
                if row.local or not local_only:
                    raise _missing(row, error) from error
        eos = generation.eos_token_id
        eos_ids = eos if isinstance(eos, list) else [eos] if eos is not None else []
        # the model's own sampling settings and penalties must never leak in: the engine does not call generate
        encoder.eos_ids = frozenset(eos_ids) | encoder.eos_ids
        if device_map is None:
            model.to(where)
        return cls(
            model,
            encoder,
            name=row.name,
            source=row.source,
            revision=_revision(row),
            device=next(model.parameters()).device,
        )

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def hidden(
        self,
        ids: Tensor,
        *,
        mask: Tensor,
        positions: Tensor,
        cache: Any = None,
    ) -> Tensor:
        """Final hidden states after the final norm, [R, T, D]; `cache` grows by T tokens.

        ids [R, T]; mask [R, past + T], 1 where a token is real; positions [R, T], any value at padding.
        """
        out = self.sites.base(
            input_ids=ids,
            attention_mask=mask,  # always given: without it repeated positions switch on packed-sequence masking
            position_ids=positions.clamp_min(0),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of final hidden states, fp32 or wider, on the engine's device."""
        logits = self._head(hidden).to(self.device)
        return logits if logits.dtype == torch.float64 else logits.float()

    def early_logits(self, hidden: Tensor, *, final_norm: bool) -> Tensor:
        """Logits of a block's activations, through the final norm or not."""
        weight = next(self.sites.final_norm.parameters())
        hidden = hidden.to(weight.device)
        return self.logits(self.sites.final_norm(hidden) if final_norm else hidden)

    @contextlib.contextmanager
    def adapted(self, adapters: Sequence[Sequence[LoRA]]) -> Iterator[None]:
        """Within the context row r runs under adapters[r]; nothing is merged into the shared weights."""
        names = sorted({name for row in adapters for lora in row for name in lora.weights})
        transforms = {name: _lora_transform(name, adapters) for name in names}
        with self.sites.hooked_modules(transforms):
            yield


def _lora_transform(name: str, adapters: Sequence[Sequence[LoRA]]) -> Any:
    """y + sum of scale * B A x, each row with its own stack: all adapters of a row concatenated along the rank."""
    alike = len({tuple(lora.key for lora in row) for row in adapters}) == 1
    stacks = []
    for row in adapters[:1] if alike else adapters:
        pairs = [(lora.weights[name], lora.scale) for lora in row if name in lora.weights]
        downs = [a for (a, _), _ in pairs]
        ups = [scale * b for (_, b), scale in pairs]
        stacks.append((torch.cat(downs), torch.cat(ups, dim=1)) if pairs else None)
    some = next(stack for stack in stacks if stack is not None)
    if alike:
        return lambda x, y: y + (x @ some[0].to(x).T) @ some[1].to(x).T
    rank = max(stack[0].shape[0] for stack in stacks if stack is not None)
    down = some[0].new_zeros(len(adapters), rank, some[0].shape[1])
    up = some[1].new_zeros(len(adapters), some[1].shape[0], rank)
    for number, stack in enumerate(stacks):
        if stack is not None:
            down[number, : stack[0].shape[0]] = stack[0]
            up[number, :, : stack[1].shape[1]] = stack[1]
    down, up = down.transpose(1, 2).contiguous(), up.transpose(1, 2).contiguous()

    def run(x: Tensor, y: Tensor) -> Tensor:
        rows = x.reshape(len(adapters), -1, x.shape[-1])
        return y + torch.bmm(torch.bmm(rows, down.to(x)), up.to(x)).view_as(y)

    return run


def pad_left(rows: Sequence[Sequence[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [R, T] padded on the left, and positions [R, T] counting from 0 at the first real token, -1 at padding."""
    longest = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), longest), fill, dtype=np.int64)
    positions = np.full((len(rows), longest), -1, dtype=np.int64)
    for r, row in enumerate(rows):
        if row:
            ids[r, longest - len(row) :] = row
            positions[r, longest - len(row) :] = np.arange(len(row))
    return ids, positions


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} asked for, but torch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices, from 0")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _read(row: ModelRow, dtype: torch.dtype, device_map: str | None, local_only: bool) -> tuple[Any, Encoder, Any]:
    """Model, encoder and generation config, from the hub's cache alone or with the network. Raises what libraries raise."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    described, _ = PretrainedConfig.get_config_dict(row.source, local_files_only=local_only)
    if "model_type" not in described:
        raise OSError("no config.json that names a model_type")
    family_of(described["model_type"])  # before gigabytes of weights
    config = AutoConfig.from_pretrained(row.source, local_files_only=local_only)
    hub_id = MODELS.get(row.name, row.name)
    encoder = Encoder.load(row.source, template=CHAT_TEMPLATES.get(hub_id), local_only=local_only)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        row.source,
        config=config,
        dtype=dtype,
        device_map=device_map,
        attn_implementation="sdpa",
        local_files_only=local_only,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loaded
    absent = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if absent:  # transformers would fill these with random numbers
        raise DataMissing(
            f"the weights of {row.source} lack {len(absent)} of the tensors its config.json asks for (or have them in "
            f"another shape), first {absent[0]!r}; config and weights do not belong together, or a file is missing"
        )
    try:
        return model, encoder, GenerationConfig.from_pretrained(row.source, local_files_only=local_only)
    except OSError:
        # a file that is damaged, or perhaps only not cached yet: its end tokens must not be lost
        if (Path(row.source) / "generation_config.json").exists() or (local_only and not row.local):
            raise
        return model, encoder, model.generation_config


def _bare_sentencepiece(tokenizer: Any) -> dict[str, float]:
    """Scores by piece of a sentencepiece file that has no tokenizer.json beside it; empty for any other tokenizer."""
    file = Path(getattr(tokenizer, "vocab_file", None) or "")
    if file.suffix != ".model" or file.with_name("tokenizer.json").exists():
        return {}
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except RuntimeError:  # Llama 3 calls its tiktoken file tokenizer.model too
        return {}
    return {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.get_piece_size())}


def _merge_by_score(tokenizer: Any, scores: Mapping[str, float]) -> None:
    """Sentencepiece's order of merges. transformers takes that of the ids: two spaces before a word become one token."""
    from tokenizers.models import BPE

    splits = [(piece[:i], piece[i:]) for piece in scores for i in range(1, len(piece))]
    merges = [(left, right) for left, right in splits if left in scores and right in scores]
    merges.sort(key=lambda pair: (scores[pair[0] + pair[1]], len(pair[0]), len(pair[1])), reverse=True)
    backend = tokenizer.backend_tokenizer
    options = {"unk_token": backend.model.unk_token, "fuse_unk": backend.model.fuse_unk, "byte_fallback": True}
    backend.model = BPE(vocab={piece: i for i, piece in enumerate(scores)}, merges=merges, **options)


def _missing(row: ModelRow, error: Exception) -> DataMissing:
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(row.source).exists() or row.local:
        return DataMissing(
            f"model folder {row.source} cannot be loaded ({_first_line(error)}); it needs config.json, "
            "tokenizer files and *.safetensors weights"
        )
    return DataMissing(
        f"model {row.name!r} ({row.source}) is not on this machine and cannot be fetched ({_first_line(error)}); "
        f"download its config.json, tokenizer files and *.safetensors (`hf download {row.source}`) into the hub "
        f"cache ({HF_HUB_CACHE}) or any folder, then pass --model_path FOLDER"
    )


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:160]
    return text if text and isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def _revision(row: ModelRow) -> str:
    """The hub commit the weights were read from, or for a local folder a hash of its weights."""
    if not row.local:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(row.source, "config.json")  # .../snapshots/COMMIT/config.json
        return Path(file).parent.name if isinstance(file, str) else "unknown"
    digest = hashlib.sha256()
    for file in sorted(Path(row.source).glob("*.safetensors")) + sorted(Path(row.source).glob("*.bin")):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return "sha256:" + digest.hexdigest()[:16]
