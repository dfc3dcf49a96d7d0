"""Every way a run can fail that a user should hear about, with its exit code.

HarnessError                 exit 1   the run itself failed
├── UsageError               exit 2   an unknown name, a bad option value, two runs on one record
├── ContextTooLong           exit 1   a prompt that cannot be cut any further; a run counts the sample and goes on
├── UserFailed               exit 1   a user's state that could not be made; a run counts their samples and goes on
├── UnsupportedModel         exit 2   no row in sites.py for this architecture
├── DataMissing              exit 4   a file, split, model or field that is not there; says what to fetch and where to put it
└── OutsideTolerance         exit 5   measured numbers that are not the published ones

The message is one line: what was given, what is allowed, the next step.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Collection, Iterable, Mapping

EXIT_CODES: Mapping[int, str] = {
    0: "complete",
    1: "the run failed, or its method changed nothing",
    2: "a mistake in the command",
    3: "saved, but some samples failed",
    4: "data or a model is missing; the message says what to fetch",
    5: "outside tolerance, or not up to date (--check)",
    130: "interrupted; the state is saved, the same command goes on",
}
"""How a command ends, and what that means."""


def gravest(codes: Collection[int]) -> int:
    """How a command ends whose parts end with these: a failure before what is missing, a mistake, and samples that failed."""
    return next((code for code in (1, 4, 2, 3) if code in codes), 0)


class HarnessError(Exception):
    """A failure with a one-line message for the user."""

    exit_code = 1


class UsageError(HarnessError):
    exit_code = 2


class UnsupportedModel(UsageError):
    pass


class ContextTooLong(HarnessError):
    """The prompt without any history is longer than the model's context minus the tokens to generate."""


class UserFailed(HarnessError):
    """What `Method.adapt` gives in place of a user's state: the user's samples are errors, for this reason."""


class DataMissing(HarnessError):
    exit_code = 4


class OutsideTolerance(HarnessError):
    exit_code = 5


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest allowed name, or a bare `;` before what is allowed."""
    near = difflib.get_close_matches(given.lower(), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ";"


def out_of_memory(error: BaseException) -> bool:
    """As a GPU says it (torch.OutOfMemoryError), or a CPU."""
    return type(error).__name__ == "OutOfMemoryError" or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def one_line(error: Exception) -> str:
    """What a user can do about an error that is none of the above; empty where it is a mistake of the harness."""
    if out_of_memory(error):
        return (
            "memory ran out; what is done is kept, and the same command goes on from there: free the device of other work, give "
            "--device cpu, a smaller --dtype or a smaller model"
        )
    return raised_in_a_file(error)


def raised_in_a_file(error: Exception) -> str:
    """What a file given as a method or task raised, and where in it; empty where it was none of them."""
    files = {os.path.abspath(str(module.__file__)) for name, module in sys.modules.items() if name.startswith("file ")}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if os.path.abspath(frame.filename) in files]
    if not frames:
        return ""
    last = frames[-1]
    return f"{last.filename}, line {last.lineno}, in {last.name}: {type(error).__name__}: {error}"
