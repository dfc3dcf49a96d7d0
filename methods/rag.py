"""Retrieval augmentation: the k items of the user's history nearest to the query go into the prompt.

Paper: Salemi et al., LaMP, ACL 2024, section 4 (in-prompt augmentation), official templates.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.data import Example
from harness.method import Fitted, Method
from harness.plan import Plan, Stream


@dataclass(frozen=True)
class RAG(Method):
    """Retrieval-augmented prompt: `k` history items by `retriever`."""

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        return Plan((Stream(self.retrieval.prompt(example)),))
