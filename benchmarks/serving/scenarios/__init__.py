"""What is measured. Each module has NAME, ``cases(plan)`` and ``measure(ctx, cases)``, which yields each case's values
as they come, or what kept it from being measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...launch import Server
from ...server_steps import Budget
from ..bench import Target, Worker
from ..configs import Sizes


@dataclass(frozen=True)
class Value:
    measure: str
    value: float
    unit: str
    note: str = ""


@dataclass(frozen=True)
class Unfit:
    """The case cannot run on this server, whatever the time."""

    note: str


@dataclass(frozen=True)
class Failed:
    """The case was tried and gave no figure."""

    note: str


@dataclass(frozen=True)
class Plan:
    """What every server of a model gets. capacity: tokens that fit the unquantized cache, where known."""

    sizes: Sizes
    capacity: int | None = None


@dataclass
class Context:
    """One running server. raw: folder for the load generators' files. warm: whether it has had loads of this size."""

    plan: Plan
    server: Server
    worker: Worker
    target: Target
    info: dict
    budget: Budget
    raw: Path
    limit: float  # seconds that one load generator may take
    held: float | None = None  # bytes of GPU memory right after start
    held_by: str = ""
    warm: bool = False

    @property
    def sizes(self) -> Sizes:
        return self.plan.sizes

    def timeout(self) -> float:
        """Seconds for the next load generator. TimeoutError when the budget is spent."""
        return min(self.budget.timeout(), self.limit)


Outcome = list[Value] | Unfit | Failed
Outcomes = Iterator[tuple[str, Outcome]]
