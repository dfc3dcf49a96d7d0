"""Prompts to token ids and back, for one tokenizer.

Chat models get messages through their own template, base models the raw text; a prompt has exactly one BOS where the
tokenizer has one. Prompt ids and answer ids are tokenised apart and concatenated, never tokenised together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from harness.data import Joint, Prompt, Rendered
from harness.errors import ContextTooLong, HarnessError, UsageError
from harness.plan import Layout

_QUESTION = [{"role": "user", "content": "question"}]
_TODAY = "26 Jul 2024"
"""What chat templates take for today: the day Llama 3.2's own falls back on."""


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
class CutPrompt:
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
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_ids = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        """Tokens that `decode` leaves out."""
        self.vocabulary: int | None = None
        """Rows of the model's embeddings, once it is known: a tokenizer may have more ids, which no prompt may hold."""
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
        if isinstance(tokenizer.chat_template, dict):
            tokenizer.chat_template = _default_of(tokenizer.chat_template, source)
        if not tokenizer.chat_template:
            beside = sorted(Path(source).glob("*.jinja"))
            tokenizer.chat_template = beside[0].read_text(encoding="utf-8") if beside else template
        encoder = cls(tokenizer, eos_ids)
        if encoder.chat:
            encoder._template(
                _QUESTION, open_turn=True
            )  # a template that cannot be used is found before the weights are read
        return encoder

    @property
    def end_id(self) -> int | None:
        """The token a finished answer ends with, where there is one."""
        own = self.tokenizer.eos_token_id
        return own if own is not None else min(self.eos_ids, default=None)

    def text(self, rendered: Rendered) -> str:
        """The string the model reads, without a BOS that the tokenizer would add. Raises HarnessError where it is no UTF-8."""
        text = self._text(rendered)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                around = text[max(0, error.start - 20) : error.end + 20]
                raise HarnessError(
                    f"a prompt holds half a character (a lone surrogate), which no model can read: {around!r}; mend it in the data"
                ) from None
        return text

    def _text(self, rendered: Rendered) -> str:
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
        begin = self._begin(ids)
        if begin is not None:
            ids, offsets = [self.bos_id, *ids[begin:]], [(0, 0), *offsets[begin:]] if fast else []
            if begin and fast:
                offsets[0] = tuple(out["offset_mapping"][begin - 1])
        return Encoded(self._known(ids), text, tuple(offsets), begin is not None)

    def _begin(self, ids: Sequence[int]) -> int | None:
        """How many ids at the front the one BOS stands for; None where the tokenizer has none."""
        if self.bos_id is None:
            return None
        return next((n for n, i in enumerate(ids) if i != self.bos_id), len(ids))

    def lengths(self, rendered: Sequence[Rendered]) -> list[int]:
        """How many ids `encode` gives each, which is known sooner: prompts are tokenised together, and nothing else is kept."""
        if not getattr(self.tokenizer, "is_fast", False) or any(isinstance(one, Joint) for one in rendered):
            return [len(self.encode(one).ids) for one in rendered]
        texts = [self.text(one) for one in rendered]
        every = (
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
        )
        begins = [self._begin(self._known(ids)) for ids in every]
        return [len(ids) if n is None else 1 + len(ids) - n for ids, n in zip(every, begins, strict=True)]

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
        return self._template(turns, open_turn=joint.open_turn, go_on=not joint.open_turn)

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
        ids = self._known(out["input_ids"])
        offsets = tuple(tuple(pair) for pair in out["offset_mapping"]) if fast else ()
        return Encoded(ids, text, offsets, bool(ids) and ids[0] == self.bos_id)

    @cached_property
    def _before_answer(self) -> str:
        """White space the template puts between its generation prompt and an answer: a space in Llama 2 and Mistral."""
        prompt = self._template(_QUESTION, open_turn=True)
        try:
            whole = self._template([*_QUESTION, {"role": "assistant", "content": "answer"}], open_turn=False)
        except UsageError:  # it takes no answers, and so puts nothing before one
            return ""
        lead = whole.removeprefix(prompt).partition("answer")[0]
        return lead if whole.startswith(prompt) and lead.isspace() else ""

    def _template(self, turns: Sequence[Mapping[str, str]], *, open_turn: bool, go_on: bool = False) -> str:
        """The template's text, the same on every day (Llama 3.2's writes the date) and without thoughts (Qwen 3).

        A template may refuse a system turn (Gemma 2) or leave it out: then its text begins the first user turn, a blank line
        after it, which is where Gemma's own templates put it. Raises UsageError where the template cannot write the turns.
        """
        if turns[0]["role"] == "system" and not self._takes_system:
            turns = _system_first_in_user(turns)
        try:
            return self._rendered(turns, open_turn=open_turn, go_on=go_on)
        except Exception as error:  # a template is a program of its own: it may raise anything
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise UsageError(
                f"the model's chat template cannot write a conversation of {', '.join(turn['role'] for turn in turns)} ({line}); "
                "leave the chat template out where the task offers that, or put one that can beside the weights as "
                "chat_template.jinja"
            ) from error

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template writes the text of a system turn."""
        turns = [{"role": "system", "content": "harness-probe"}, *_QUESTION]
        try:
            return "harness-probe" in self._rendered(turns, open_turn=True, go_on=False).casefold()
        except Exception:  # as in _template: any error is its way to refuse
            return False

    def _rendered(self, turns: Sequence[Mapping[str, str]], *, open_turn: bool, go_on: bool) -> str:
        return self.tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=open_turn,
            continue_final_message=go_on,
            date_string=_TODAY,
            enable_thinking=False,
        )

    def _ids(self, text: str) -> tuple[int, ...]:
        return self._known(self.tokenizer.encode(text, add_special_tokens=False))

    def _known(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids themselves. Raises UsageError for one that the model has no embedding of."""
        if self.vocabulary is not None and ids and max(ids) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UsageError(
                f"the tokenizer writes {token!r} as id {max(ids)}, and the model has embeddings of ids 0 to "
                f"{self.vocabulary - 1}; tokenizer and weights do not belong together, or the text holds a token of another model"
            )
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def before(self, ids: Sequence[int], stop: Sequence[str]) -> str | None:
        """The text before the first of the stop strings in an answer; None where none stands there.

        A stop string may be, or hold, the text of a special token, which answers never show.
        """
        text = self.decode(ids)
        cuts = [text[:at] for s in stop if (at := text.find(s)) >= 0]
        if not self.special_ids.isdisjoint(ids):
            whole = self._decode_all(ids)
            for at in (at for s in stop if (at := whole.find(s)) >= 0):
                kept = next(n for n in range(len(ids), -1, -1) if len(self._decode_all(ids[:n])) <= at)
                cuts.append(self.decode(ids[:kept]) + whole[len(self._decode_all(ids[:kept])) : at])
        return min(cuts, key=len, default=None)

    def _decode_all(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode_within(self, prompt: Prompt, room: int) -> CutPrompt:
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
            return CutPrompt(encoded.without_first(cut), kept, asked - kept, cut)
        if cut > 0:
            raise ContextTooLong(
                f"the query alone has {len(encoded.ids)} tokens and the context has room for {room}; it is never cut"
            )
        return CutPrompt(encoded, kept, asked - kept)


def _default_of(templates: Mapping[str, str], source: str | Path) -> str:
    """Of several named chat templates the one for conversations. Raises UsageError where none is."""
    if "default" in templates:
        return templates["default"]
    raise UsageError(
        f"model {source} has the chat templates {', '.join(sorted(templates))} and none called default; put the one to use "
        "beside its weights as chat_template.jinja"
    )


def _system_first_in_user(turns: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    system, rest = turns[0], list(turns[1:])
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system["content"]}, *rest]
    return [{"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


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
