"""The edits of a batch: each row carries its own, and one hook call a site runs them all.

A group of rows whose k-th edit at a site has the same class is bound once (`Edit.bind`) and runs as one tensor
function; what it changes is kept only at the positions each row's `where` names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.edits import Bound, Replace
from harness.engine.sites import Sites, Transform
from harness.errors import HarnessError
from harness.plan import Edit, Layout, Site, places


@dataclass
class _Group:
    """Edits of one class in one round at one site: at most one a row."""

    rows: list[int]
    edits: list[Edit]
    bound: Bound | None
    index: Tensor | None
    """Row numbers on the site's device; None where the group covers every row in order."""
    mask: Tensor | None = None
    """[r, T, 1] for the coming forward pass; None = everywhere."""
    active: bool = False


class RowEdits:
    """The edits of R rows, bound once; call `at` with the positions before every forward pass.

    The k-th edit of a row at a site runs in round k, so the order inside a row survives; within a round rows are
    grouped by edit class. A packed forward pass [1, R * T, D] is seen as [R, T, D].
    """

    def __init__(self, edits: Sequence[Sequence[Edit]], layouts: Sequence[Layout], sites: Sites) -> None:
        self.rows = len(edits)
        self.layouts = layouts
        self.sites = sites
        self.fired_prompt = 0
        """(row, position) pairs below the last prompt token edited by the forward passes so far."""
        self.fired_decode = 0
        """The same from the last prompt token on."""
        self._rounds: dict[Site, list[list[_Group]]] = {}
        by_site: dict[Site, list[list[tuple[int, Edit]]]] = defaultdict(list)
        for row, row_edits in enumerate(edits):
            depth: dict[Site, int] = defaultdict(int)
            for edit in row_edits:
                site, k = edit.site, depth[edit.site]
                depth[site] += 1
                if k == len(by_site[site]):
                    by_site[site].append([])
                by_site[site][k].append((row, edit))
        for site, rounds in by_site.items():
            like = sites.parameter(sites.check(site))
            self._rounds[site] = [self._groups(entries, like) for entries in rounds]

    def _groups(self, entries: list[tuple[int, Edit]], like: Tensor) -> list[_Group]:
        by_class: dict[type[Edit], list[tuple[int, Edit]]] = defaultdict(list)
        for row, edit in entries:
            by_class[type(edit)].append((row, edit))
        groups = []
        for kind, members in by_class.items():
            rows = [row for row, _ in members]
            edits = [edit for _, edit in members]
            bound = None if kind is Replace else _bound(kind, edits, like)
            whole = rows == list(range(self.rows))
            index = None if whole else torch.tensor(rows, device=like.device)
            groups.append(_Group(rows, edits, bound, index))
        return groups

    def at(self, positions: np.ndarray) -> None:
        """Prepare for a forward pass over absolute `positions` [R, T]; -1 marks padding, which no edit touches."""
        for site, rounds in self._rounds.items():
            like = self.sites.parameter(site)
            for group in (group for groups in rounds for group in groups):
                where = np.stack(
                    [
                        places(edit.where, positions[row], self.layouts[row]) & (positions[row] >= 0)
                        for row, edit in zip(group.rows, group.edits, strict=True)
                    ]
                )
                hits = int(where.sum())
                ends = np.array([[self.layouts[row].prompt_len - 1] for row in group.rows])
                before = int((where & (positions[group.rows] < ends)).sum()) if hits else 0
                self.fired_prompt += before
                self.fired_decode += hits - before
                group.active = hits > 0
                group.mask = None if hits == where.size else torch.from_numpy(where)[..., None].to(like.device)
                if isinstance(group.edits[0], Replace):
                    group.bound = Replace.bind_at(group.edits, like, positions[group.rows])  # type: ignore[arg-type]

    def transforms(self) -> dict[Site, list[Transform]]:
        """What `Sites.hooked` installs."""
        return {site: [partial(self._run, rounds)] for site, rounds in self._rounds.items()}

    def _run(self, rounds: list[list[_Group]], x: Tensor) -> Tensor | None:
        if not any(group.active for groups in rounds for group in groups):
            return None
        shape = x.shape
        x = x.reshape(self.rows, -1, shape[-1])
        for groups in rounds:
            for group in groups:
                if not group.active:
                    continue
                assert group.bound is not None
                old = x if group.index is None else x[group.index]
                new = _edited(group, old)
                if group.mask is not None:
                    new = torch.where(group.mask, new, old)
                x = new if group.index is None else x.index_copy(0, group.index, new)
        return x.reshape(shape)


def _edited(group: _Group, old: Tensor) -> Tensor:
    """What the group's edits make of activations [r, T, D]. Raises HarnessError where that has another shape, or none."""
    assert group.bound is not None
    try:
        new: object = group.bound(old)
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        if not any(
            word in line for word in ("size of tensor", "shapes", "must match", "expanded size")
        ):  # out of memory, say
            raise
        raise _misfit(group, old, line) from error
    if not isinstance(new, Tensor) or new.shape != old.shape:
        raise _misfit(group, old, f"it gave {list(new.shape) if isinstance(new, Tensor) else type(new).__name__}")
    return new


def _misfit(group: _Group, old: Tensor, why: str) -> HarnessError:
    edit = group.edits[0]
    return HarnessError(
        f"edit {type(edit).__name__} does not fit the model at {edit.site.part} of block {edit.site.layer}, whose activations are "
        f"[rows, tokens, {old.shape[-1]}]: {why}"
    )


def acts_before(edit: Edit, end: int, layout: Layout) -> bool:
    """Whether the edit touches any position below `end`."""
    return bool(end > 0 and places(edit.where, np.arange(end), layout).any())


def _bound(kind: Any, edits: Sequence[Edit], like: torch.Tensor) -> Any:
    """What the edits do. Raises HarnessError where what they hold cannot be computed with."""
    try:
        return kind.bind(edits, like)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise HarnessError(
            f"edit {kind.__name__} at {edits[0].site}: its values cannot be used ({type(error).__name__}: {reason}); "
            "see harness/edits.py for what it takes"
        ) from error
