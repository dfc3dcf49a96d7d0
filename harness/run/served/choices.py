"""Choices that a server scored: which of them is most likely, under one prompt or a mix of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from harness.data import Example, Joint
from harness.errors import HarnessError
from harness.mix import First
from harness.plan import Mix, PlacedMix, Scored, StreamOutput
from harness.run.answers import Chosen
from harness.servers.chat import Reply
from harness.servers.scoring import logprobs


def why_not_mixed(mix: Mix | PlacedMix, example: Example) -> str:
    """Why the mix of several prompts' choices cannot be had from their log-probabilities alone; empty where it can.

    A linear mix of log-probabilities is that of the whole vocabulary up to one number, the same for all choices: it decides
    between them, unless that number is divided by lengths that differ.
    """
    if not getattr(mix, "linear", False):
        return "whose mix needs the log-probabilities of the whole vocabulary"
    if not example.choices:
        return "whose mix decides every token of a written answer by the log-probabilities of the whole vocabulary"
    if len(example.choices) == 1:
        return "and of an answer without another to choose a mix says nothing"
    divided = example.compared == "character" or isinstance(
        example.prompt().render(), Joint
    )  # lm-eval has metrics a character
    if divided and len({len(choice) for choice in example.choices}) > 1:
        return "whose mix is known up to a number that all choices share, and choices of unlike length are compared a character"
    return ""


def chosen(
    replies: Sequence[Sequence[Reply]], mix: Mix | PlacedMix, example: Example
) -> tuple[Chosen, Sequence[bool | None]]:
    """The choices scored, from the replies of each stream to each choice, and whether each is all of the likeliest tokens.

    Under a mix the log-probability that the answer is this one of the choices: those of the other tokens are not known.
    Raises HarnessError where a choice of a mix is more than one token, or a number is missing.
    """
    numbers = [[logprobs(reply) for reply in stream] for stream in replies]
    if mix == First():
        likeliest = [[token.likeliest for token in reply.scored] for reply in replies[0]]
        greedy = [None if None in tokens else all(tokens) for tokens in likeliest]
        return Chosen(tuple(Scored(n, tuple(map(bool, t))) for n, t in zip(numbers[0], likeliest, strict=True))), greedy
    for stream in numbers:
        for choice, found in zip(example.choices, stream, strict=True):
            if len(found) != 1:
                raise HarnessError(
                    f"{choice!r} is {len(found)} tokens; over a server a mix of several prompts is exact where every choice is one"
                )
    streams = [StreamOutput(torch.tensor([[[n[0] for n in stream]]], dtype=torch.float64), ()) for stream in numbers]
    mixed = cast(Mix, mix)(streams)[0, 0].tolist()  # one that knows its place was refused
    return Chosen(tuple(Scored((value,), (False,)) for value in mixed)), [None] * len(mixed)
