"""What a method asks for: forward passes (streams) with edits to activations, and how to mix their outputs.

Positions are absolute token positions of the whole sequence (prompt, then response), never relative to the tensor a
hook sees. A row's `prompt_len` splits it: DECODE is position >= prompt_len - 1, exactly the positions whose outputs
predict response tokens; PROMPT is the rest, so ALL = PROMPT + DECODE; GENERATED is position >= prompt_len.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self, TypeAlias, cast, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch

    from harness.data import Prompt
from harness.errors import HarnessError, UsageError

Part: TypeAlias = Literal["block_in", "block_out", "attn_out", "mlp_out", "heads_out", "queries", "pattern"]
PARTS: tuple[Part, ...] = ("block_in", "queries", "heads_out", "attn_out", "mlp_out", "block_out", "pattern")
"""In the order a block computes them (`pattern`, the attention weights, can only be read)."""


@dataclass(frozen=True)
class Layout:
    """What a `Where` needs to know of one row."""

    prompt_len: int
    bos: bool = False
    """Whether token 0 is a beginning-of-sequence token."""
    offsets: tuple[tuple[int, int], ...] = ()
    """Character span of each prompt token in `text`; empty where the tokenizer gives none."""
    text: str = ""


class Where(Protocol):
    """Which positions of a row an edit touches: an array of absolute positions in, booleans of the same shape out."""

    def __call__(self, positions: np.ndarray, layout: Layout) -> np.ndarray: ...


def places(where: Where, positions: np.ndarray, layout: Layout) -> np.ndarray:
    """What a `Where` says of positions. Raises HarnessError where that is not one boolean for each."""
    found: object = where(positions, layout)
    if getattr(found, "shape", None) != positions.shape or str(getattr(found, "dtype", "")) != "bool":
        kind = f"{type(found).__name__} {getattr(found, 'dtype', '')} {list(getattr(found, 'shape', ()))}"
        raise HarnessError(
            f"where {where!r} gave a {kind} for positions {list(positions.shape)}; expected an array of booleans of the same shape"
        )
    return cast("np.ndarray", found)


@dataclass(frozen=True)
class _Range:
    """Positions lo <= p < hi, each bound an offset from 0 or from prompt_len. The common cases, cheap to test."""

    name: str
    lo: int = 0
    lo_from_prompt_end: bool = False
    hi: int | None = None
    """None = no upper bound; else an offset from prompt_len."""

    def __call__(self, positions: np.ndarray, layout: Layout) -> np.ndarray:
        inside = positions >= self.lo + (layout.prompt_len if self.lo_from_prompt_end else 0)
        return inside if self.hi is None else inside & (positions < layout.prompt_len + self.hi)

    def __repr__(self) -> str:
        return self.name


ALL = _Range("ALL")
PROMPT = _Range("PROMPT", hi=-1)
LAST_PROMPT = _Range("LAST_PROMPT", lo=-1, lo_from_prompt_end=True, hi=0)
DECODE = _Range("DECODE", lo=-1, lo_from_prompt_end=True)
GENERATED = _Range("GENERATED", lo=0, lo_from_prompt_end=True)


@dataclass(frozen=True)
class _AllButBos:
    def __call__(self, positions: np.ndarray, layout: Layout) -> np.ndarray:
        return positions >= (1 if layout.bos else 0)

    def __repr__(self) -> str:
        return "ALL_BUT_BOS"


ALL_BUT_BOS = _AllButBos()


@dataclass(frozen=True)
class FirstLast:
    """The first n and the last m tokens of the prompt (`f7+l7` in ReFT's notation), each at most half of it.

    So they never overlap, and what edits the first never edits the last.
    """

    first: int
    last: int

    def __call__(self, positions: np.ndarray, layout: Layout) -> np.ndarray:
        first, last = (min(n, layout.prompt_len // 2) for n in (self.first, self.last))
        edges = (positions < first) | (positions >= layout.prompt_len - last)
        return (positions < layout.prompt_len) & edges


@dataclass(frozen=True)
class At:
    """Given positions; negative ones count from the end of the prompt."""

    indices: tuple[int, ...]

    def __call__(self, positions: np.ndarray, layout: Layout) -> np.ndarray:
        wanted = {index if index >= 0 else layout.prompt_len + index for index in self.indices}
        return _is_in(positions, wanted)


@dataclass(frozen=True)
class Text:
    """Prompt tokens that overlap an occurrence of `span` in the rendered prompt."""

    span: str

    def __call__(self, positions: np.ndarray, layout: Layout) -> np.ndarray:
        inside = set()
        at = layout.text.find(self.span)
        while at >= 0:
            end = at + len(self.span)
            inside |= {p for p, (lo, hi) in enumerate(layout.offsets) if lo < end and hi > at}
            at = layout.text.find(self.span, at + 1)
        return _is_in(positions, inside)


def _is_in(positions: np.ndarray, wanted: Iterable[int]) -> np.ndarray:
    found = positions < 0
    for position in wanted:
        found = found | (positions == position)
    return found & (positions >= 0)


@dataclass(frozen=True)
class Site:
    """A place in the network: a 0-based block and a part of it.

    block_in, block_out: the residual stream entering and leaving the block, width D.
    attn_out, mlp_out:   what attention and the MLP add to it, width D.
    heads_out:           the input of the attention output projection, width H x head_dim (query heads).
    queries:             queries before rotary embedding, after a query norm where the family has one, H x head_dim.
    pattern:             attention weights, read only.
    """

    layer: int
    part: Part


@runtime_checkable
class Edit(Protocol):
    """A change to activations at one site. A frozen value; tensors live in it, state does not."""

    @property
    def site(self) -> Site: ...

    @property
    def where(self) -> Where: ...

    @classmethod
    def bind(cls, edits: Sequence[Self], like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """One function for a batch, built once: tensor [R, T, D] in and out, row r changed by edits[r] at every position.

        The engine keeps the change only where `where` holds; `like` carries the device and dtype.
        """
        ...


@dataclass(frozen=True)
class Exit:
    """Next-token logits read early: the site's activation, optionally through the final norm, through the LM head."""

    site: Site
    final_norm: bool = True


class ExitRule(Protocol):
    """Which exits to read of a model whose depth a plan does not know. A value: equal rules give equal exits."""

    def __call__(self, layers: int, *, tied: bool) -> tuple[Exit, ...]:
        """For a model of `layers` blocks; `tied` = its LM head is its embedding matrix."""
        ...


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter applied to this row only, never merged: y + scale * B A x at each named linear module."""

    key: str
    """Rows whose adapters have equal keys share a prefill."""
    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """Module name in the model -> (A [rank, in], B [out, rank])."""
    scale: float = 1.0


@dataclass(frozen=True)
class Stream:
    """One forward pass: a prompt, the edits and adapters it runs under, and the early exits to read."""

    prompt: Prompt
    edits: tuple[Edit, ...] = ()
    adapters: tuple[LoRA, ...] = ()
    exits: tuple[Exit, ...] = ()
    early: ExitRule | None = None
    """Exits that depend on the model; `Decoder.prepare` appends them to `exits`."""

    def bare(self) -> Stream:
        """The same prompt on the unedited model."""
        return Stream(self.prompt)


@dataclass(frozen=True)
class StreamOutput:
    """One stream of the rows that share a mix."""

    logits: torch.Tensor
    """[R, T, V], fp32 or wider."""
    exits: tuple[torch.Tensor, ...] = ()
    """One [R, T, V] for each `Stream.exits`, in order."""


@dataclass(frozen=True)
class Place:
    """Where in their responses the rows stand whose logits a placed mix gets: ids, positions and step."""

    prompts: tuple[tuple[int, ...], ...]
    """By row, the token ids of the first stream's prompt, cut to the context."""
    responses: tuple[tuple[int, ...], ...]
    """By row, the ids of its response as far as they are known."""
    first: int
    """Logits [:, j] predict response token number first + j; number 0 is the first."""

    def before(self, row: int, j: int) -> tuple[int, ...]:
        """The ids of prompt and response that stand before the token that logits [row, j] predict."""
        return self.prompts[row] + self.responses[row][: self.first + j]


class Mix(Protocol):
    """How the streams of a plan become next-token log-probabilities. Must be hashable: rows are grouped by equal mix."""

    def __call__(self, outputs: Sequence[StreamOutput]) -> torch.Tensor:
        """Normalised log-probabilities [R, T, V]. Works position by position, so the engine may split R and T."""
        ...


class PlacedMix(Protocol):
    """A mix that knows ids, positions and step: its class says `placed = True`."""

    placed: ClassVar[bool]

    def __call__(self, outputs: Sequence[StreamOutput], place: Place) -> torch.Tensor:
        """As `Mix`; row r of the outputs is row r of the place."""
        ...


def apply(mix: Mix | PlacedMix, outputs: Sequence[StreamOutput], place: Place) -> torch.Tensor:
    """The mix of the outputs, which knows their place where it wants to."""
    called: Callable[..., torch.Tensor] = mix
    return called(outputs, place) if getattr(mix, "placed", False) is True else called(outputs)


@dataclass(frozen=True)
class _First:
    def __call__(self, outputs: Sequence[StreamOutput]) -> torch.Tensor:
        return outputs[0].logits.log_softmax(-1)

    def __repr__(self) -> str:
        return "First()"


class Choose(Protocol):
    """Which of several responses is the answer: its place among them. A value, as a mix is; no model call."""

    def __call__(self, drawn: Sequence[Generated]) -> int: ...


MOST_DRAWS = 10_000
"""A row each; more is a slip of the finger."""


@dataclass(frozen=True)
class Draws:
    """`count` responses to one prompt, sampled side by side in one batch, and which of them is the answer.

    Each has noise of its own, decided by the run's seed, the example and its number; top_k and top_p are the command's.
    """

    count: int
    choose: Choose
    temperature: float = 1.0

    def __post_init__(self) -> None:
        whole = isinstance(self.count, int) and 1 <= self.count <= MOST_DRAWS
        if not whole or not isinstance(self.temperature, int | float) or not 1e-3 <= self.temperature <= 1e3:
            raise UsageError(
                f"{self.count!r} responses at temperature {self.temperature!r}: allowed are 1 to {MOST_DRAWS}, at 0.001 to 1000"
            )


@dataclass(frozen=True)
class MostLikely:
    """The response with the highest mean log-probability of its tokens: best of n by the model itself."""

    def __call__(self, drawn: Sequence[Generated]) -> int:
        means = [sum(one.logprobs) / max(1, len(one.logprobs)) for one in drawn]
        return max(range(len(drawn)), key=means.__getitem__)


@dataclass(frozen=True)
class MostCommon:
    """The response that came most often, case and white space aside, the first of equals: self-consistency (Wang et al. 2023)."""

    def __call__(self, drawn: Sequence[Generated]) -> int:
        said = [" ".join(one.text.split()).casefold() for one in drawn]
        return max(range(len(drawn)), key=lambda number: said.count(said[number]))


@dataclass(frozen=True)
class Plan:
    """What one example needs: its streams, and the mix of their outputs (by default the first stream's own)."""

    streams: tuple[Stream, ...]
    mix: Mix | PlacedMix = _First()
    answer: str | None = None
    """The response, where it needs no model: then no pass is run. Of an example with choices one of these."""
    draws: Draws | None = None
    """Several responses of which one is chosen; None = one, as the command says. Choices are scored all the same."""

    def __post_init__(self) -> None:
        if not self.streams:
            raise HarnessError(
                f"a plan has {self.streams!r} for its streams; expected at least one, as in Plan((Stream(prompt),))"
            )

    @property
    def changes(self) -> bool:
        """Whether it is more than one bare stream as it is, so that its log-probabilities should differ from the model's."""
        first = self.streams[0]
        edited = bool(first.edits or first.adapters or first.exits or first.early)
        return len(self.streams) > 1 or edited or self.mix != _First()

    def rows(self, *, scored: bool) -> int:
        """Of a batch: one a stream, and so many for each response that is drawn; of choices that are scored none is."""
        return len(self.streams) * (1 if self.draws is None or scored else self.draws.count)


class Sites(Protocol):
    """How large the model is, and which places in it an edit can name."""

    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int:
        """Query heads of a block."""

    @property
    def head_dim(self) -> int: ...
    @property
    def width(self) -> int:
        """Of the residual stream."""

    def check(self, site: Site) -> Site:
        """The site itself. Raises UsageError where the model has none like it."""


# How plans are decoded, and what comes back


TEMPERATURES = "0, which is greedy, or 0.001 to 1000"


def sane_temperature(value: float) -> bool:
    """Whether log-probabilities divided by it make a distribution."""
    return value == 0 or 1e-3 <= value <= 1e3


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; else top-k and top-p of the tempered distribution, noise keyed by (seed, sample, step)."""

    temperature: float = 0.0
    top_k: int = 0
    """0 = no cut."""
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not sane_temperature(self.temperature) or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: allowed are a temperature of "
                f"{TEMPERATURES}, a top_k of 0 or more, and a top_p above 0, up to 1"
            )


GREEDY = Sampling()


@dataclass(frozen=True)
class Generated:
    ids: tuple[int, ...]
    """With the end token, where one was generated."""
    logprobs: tuple[float, ...]
    """Of each id under the plan's mix, in nats."""
    text: str
    finish: Literal["stop", "length", "given"]
    drawn: tuple[str, ...] = ()
    """All responses, this one among them, where it was chosen of several."""


@dataclass(frozen=True)
class Scored:
    logprobs: tuple[float, ...]
    """Of each continuation token, in nats."""
    greedy: tuple[bool, ...]
    """Whether the token is the most likely one at its position."""
