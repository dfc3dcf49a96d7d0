"""Answer several times and keep the answer that is most like the user's own texts: an example of a plan that draws.

    harness check docs/examples/best_of_n.py
    harness run --method docs/examples/best_of_n.py --task lamp4 --set n=4

`choose=likely` keeps the most likely answer (best of n), `choose=common` the one that came most often (self-consistency).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from harness.data import Example
from harness.method import Fitted, Method
from harness.plan import Choose, Draws, Generated, MostCommon, MostLikely, Plan, Stream
from harness.plugins.options import Count


@dataclass(frozen=True)
class MostAlike:
    """The response that shares the largest part of its words with the texts."""

    texts: tuple[str, ...]

    def __call__(self, drawn: Sequence[Generated]) -> int:
        known = {word for text in self.texts for word in text.casefold().split()}
        said = [one.text.casefold().split() for one in drawn]
        shares = [sum(word in known for word in words) / max(1, len(words)) for words in said]
        return max(range(len(drawn)), key=shares.__getitem__)


@dataclass(frozen=True)
class BestOfN(Method):
    """Of `n` answers the one that is most like the user's history, most likely, or most common."""

    n: Count = 4
    choose: Literal["alike", "likely", "common"] = "alike"
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        choose: Choose = MostLikely() if self.choose == "likely" else MostCommon()
        if self.choose == "alike":
            choose = MostAlike(tuple(item.document for item in example.user.history))
        return Plan((Stream(self.context.prompt(example)),), draws=Draws(self.n, choose, self.temperature))
