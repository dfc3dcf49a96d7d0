"""What the README and docs/architecture.md promise a stranger: their methods pass `harness check`, and run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = "--task lamp4 --model tiny --limit 4 --max_new_tokens 8"

# written from docs/architecture.md and methods/cad.py alone
NEW_AND_OLD = '''
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from harness.data import Example
from harness.errors import UsageError
from harness.method import Fitted, Method
from harness.mix import Contrast
from harness.plan import Plan, Stream


@dataclass(frozen=True)
class NewAndOld(Method):
    """Contrast the most recent history items with the oldest."""

    weight: float = 0.5
    """Of the contrast, >= 0; 0 is the recent items alone."""
    items: int = 2
    """Of each side."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.items < 1:
            raise UsageError(f"weight {self.weight}, items {self.items}: allowed weight >= 0, items >= 1")

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        history = example.user.history
        recent, oldest = tuple(reversed(history[-self.items :])), history[: self.items]
        return Plan((Stream(example.prompt(recent)), Stream(example.prompt(oldest))), Contrast(self.weight))

    def neutral(self) -> Self:
        return replace(self, weight=0.0)
'''


def _readme() -> dict[str, str]:
    """The README's methods, by the file name in their first line."""
    blocks = re.findall(
        r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    return dict(blocks)


METHODS = {**_readme(), "new_and_old.py": NEW_AND_OLD}


def test_the_readme_shows_two_methods() -> None:
    assert list(_readme()) == ["mine.py", "habits.py"]


@pytest.mark.parametrize("file", METHODS)
def test_a_method_that_is_shown_passes_the_check_and_runs(file: str, harness: Callable, tmp_path: Path) -> None:
    (tmp_path / file).write_text(METHODS[file], encoding="utf-8")
    checked = harness(f"check ./{file}")
    assert checked.code == 0, checked.err
    done = harness(f"run --method ./{file} {RUN}")
    assert done.code == 0, done.err
