"""Needle tests: a fact is hidden in long text and asked for; retrieval heads are those that look at it while it is copied.

Paper: Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, ICLR 2025, section 2. While the model
writes token w, a head has copied it where the position it attends to most lies in the needle and holds w; its score is
the number of such steps over the needle's length. Code read: nightdessert/Retrieval_Head (3 needles, 2 lengths up to
5,000 tokens, 10 depths; a run counts where the answer's ROUGE-1 recall of the needle exceeds 0.5), as used by DeCoRe.
Differs from that code:
- The text around the needle is what the caller gives (the train users' histories), the needles are ours, and the
  question is a user turn where the model has a chat template.
- A model that answers no test has no retrieval heads by it (upstream writes an empty file). `copying_scores` then scores
  heads by what they copy from the prompt while the model reads a task's references.
- Attention is read in one teacher-forced pass over the answer, not token by token; it is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from harness.data import HistoryItem, Message, Prompt
from harness.engine.capture import most_attended
from harness.engine.encoder import Encoder
from harness.engine.prompt_variants import ROW_TOKENS
from harness.engine.rows import Request
from harness.errors import ContextTooLong, HarnessError, UsageError
from harness.fit.kit import ModelKit
from harness.plan import Plan, Stream, Text

ANSWER_TOKENS = 50
RECALL = 0.5
LENGTHS = (0.28, 1.0)
"""Shares of the longest text; with 3,579 tokens they are upstream's 1,000 and 3,579."""


@dataclass(frozen=True)
class Needle:
    question: str
    fact: str
    """What the text holds; ends with `answer` and a full stop."""
    answer: str
    """The part of the fact that the question asks for."""


NEEDLES = (
    Needle(
        "What is the best thing to do in Lisbon?",
        "The best thing to do in Lisbon is to ride the old yellow tram up the hill and watch the river at sunset.",
        "ride the old yellow tram up the hill and watch the river at sunset",
    ),
    Needle(
        "What did Marta keep in the blue tin box?",
        "In the blue tin box Marta kept three letters from her brother and a map of the northern islands.",
        "three letters from her brother and a map of the northern islands",
    ),
    Needle(
        "How does the village bakery make its rye bread?",
        "The village bakery makes its rye bread with sour milk and caraway seeds and bakes it twice in a stone oven.",
        "with sour milk and caraway seeds and bakes it twice in a stone oven",
    ),
)


@dataclass(frozen=True)
class NeedleScores:
    """Retrieval scores of every head."""

    scores: Tensor
    """[answered, layers, H], float64: one row for each test whose answer recalled more than half of the needle's words."""
    tests: int


@dataclass(frozen=True)
class _Question:
    """The text as it is: no history to render."""

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        return (Message("user", text),)


def needle_scores(kit: ModelKit, texts: Sequence[str], *, tokens: int | None = None, depths: int = 10) -> NeedleScores:
    """Hides every needle in `texts`, at two lengths up to `tokens` and `depths` depths each, and scores all heads.

    By default the longest text has 3,579 tokens, as published, or a quarter of a smaller context.

    Raises HarnessError where there is no text, where a test does not fit the context, and where the tokenizer tells no
    positions.
    """
    if not any(text.strip() for text in texts):
        raise HarnessError("needle tests: no text to hide a needle in; the fit split's users have no history")
    tokens = tokens or min(3579, kit.lm.max_length // 4)
    tests = [
        (needle, _request(kit, f"{n}/{length}/{depth}", needle, text, depth))
        for n, needle in enumerate(NEEDLES)
        for length in LENGTHS
        for text in [_haystack(kit.lm.encoder, islice(cycle(texts), n, None), int(length * tokens))]
        for depth in np.linspace(0, 1, depths)
    ]
    shape = (0, kit.lm.sites.layers, kit.lm.sites.heads)
    scores = [torch.zeros(shape, dtype=torch.float64)]
    for batch in _batches(kit, [request for _, request in tests]):
        kit.progress("needle tests", batch[0], len(tests))
        answers = kit.decoder.generate([tests[i][1] for i in batch], max_new_tokens=ANSWER_TOKENS, stop=("\n",))
        right = [
            (*tests[i], answer.ids)
            for i, answer in zip(batch, answers, strict=True)
            if _recall(tests[i][0].answer, answer.text) > RECALL
        ]
        if right:
            looked = most_attended(kit.lm, [request for _, request, _ in right], [ids for _, _, ids in right])
            for (needle, request, ids), best in zip(right, looked, strict=True):
                span = _span(request, needle)
                scores.append(_copied(request, span, ids, best)[None] / span.sum())
    kit.progress("needle tests", len(tests), len(tests))
    return NeedleScores(torch.cat(scores), len(tests))


def copying_scores(kit: ModelKit, plans: Sequence[Plan], targets: Sequence[str]) -> Tensor:
    """Share of each reference's tokens that a head copies from the prompt while the model reads it: [n, layers, H].

    As a retrieval score, with the whole prompt for a needle. Raises HarnessError where a prompt does not fit.
    """
    pairs = [
        kit.reference(plan, target, f"copying heads: sample {number}")
        for number, (plan, target) in enumerate(zip(plans, targets, strict=True))
    ]
    scores = []
    for batch in _batches(kit, [request for request, _ in pairs]):
        kit.progress("copying heads", batch[0], len(pairs))
        chosen = [pairs[i] for i in batch]
        looked = most_attended(kit.lm, [request for request, _ in chosen], [answer for _, answer in chosen])
        for (request, answer), best in zip(chosen, looked, strict=True):
            anywhere = np.ones(request.tokens, dtype=bool)
            scores.append(_copied(request, anywhere, answer, best) / len(answer))
    kit.progress("copying heads", len(pairs), len(pairs))
    return torch.stack(scores)


def _request(kit: ModelKit, key: str, needle: Needle, text: str, depth: float) -> Request:
    """A needle at a share of the way into a text, at the nearest end of a line before, and the question after it."""
    at = text.rfind("\n", 0, 1 + int(depth * len(text))) + 1 if depth < 1 else len(text)
    question = f"Answer from the text above alone. Question: {needle.question}\nAnswer:"
    whole = f"{text[:at]}{needle.fact}\n{text[at:]}\n\n{question}"
    try:
        request = kit.decoder.prepare(key, Plan((Stream(Prompt(_Question(), whole)),)), ANSWER_TOKENS)
    except ContextTooLong as error:
        raise UsageError(f"needle tests: {error}; give fewer tokens of text (--set needle_tokens=...)") from error
    if not _span(request, needle).any():
        raise HarnessError(f"needle tests: the tokenizer of {kit.lm.name} tells no positions; it must be a fast one")
    return request


def _haystack(encoder: Encoder, texts: Iterator[str], tokens: int) -> str:
    """Lines of text, `tokens` tokens or a little fewer, the texts repeated where they are too few."""
    lines: list[str] = []
    room = tokens
    for text in texts:
        line = " ".join(text.split()) + "\n"
        cost = max(1, len(encoder.encode(line).ids) - 1)
        if cost > room:
            words = line.split()
            kept = words[: int(len(words) * room / cost)]
            return "".join([*lines, " ".join(kept) + "\n"]) if kept else "".join(lines)
        lines.append(line)
        room -= cost
    return "".join(lines)


def _span(request: Request, needle: Needle) -> np.ndarray:
    layout = request.prompts[0].encoded.layout()
    return Text(needle.fact)(np.arange(layout.prompt_len), layout)


def _copied(request: Request, needle: np.ndarray, answer: Sequence[int], best: Tensor) -> Tensor:
    """How many answer tokens each head copied, [layers, H]: it looked most at that token in the needle, just before.

    `needle` [prompt_len] marks the needle's tokens; `best` [T, layers, H] is where each head looked.
    """
    ids = torch.tensor(request.prompts[0].encoded.ids)
    at = best.clamp(max=len(ids) - 1)  # a head may look at the answer itself
    hit = (best < len(ids)) & torch.from_numpy(needle)[at] & (ids[at] == torch.tensor(answer)[:, None, None])
    return hit.sum(dim=0, dtype=torch.float64)


def _recall(wanted: str, answer: str) -> float:
    """ROUGE-1 recall."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"]).score(wanted, answer)["rouge1"].recall


def _batches(kit: ModelKit, requests: Sequence[Request]) -> Iterator[list[int]]:
    """Numbers of the requests in their order, as many together as one pass may hold tokens."""
    batch: list[int] = []
    for number in range(len(requests)):
        longest = max(requests[i].tokens for i in [*batch, number]) + ANSWER_TOKENS
        if batch and longest * (len(batch) + 1) > ROW_TOKENS[kit.lm.device.type]:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
