"""How long everything is, and how large the cache: such that requests must be retracted."""

from __future__ import annotations

from dataclasses import dataclass

PROMPTS = 4  # system prompts that sessions share
ROOM = 1.3  # the cache, in working sets
ESSAYS = 0.15  # of answers


class PlanError(ValueError):
    """Numbers that leave no room for a session."""


@dataclass(frozen=True)
class Plan:
    """Tokens. user, answer, essay: fewest and most; an essay is a long answer. pool: of the whole cache.

    The working set is what ``parallel`` requests hold at a time: the system prompts, and of each a session that is
    halfway through. Sessions that are further, and answers several at a time, need more than the pool has.
    """

    context: int
    turns: int
    parallel: int
    sessions: int
    system: int
    user: tuple[int, int]
    answer: tuple[int, int]
    essay: tuple[int, int]
    pool: int

    @classmethod
    def of(cls, context: int, turns: int, parallel: int, sessions: int) -> Plan:
        """context: of a whole session. sessions: that go on side by side; those that do not run wait for their turn."""
        system = context // 8
        step = (context - system) // turns
        if step < 16:
            raise PlanError(
                f"--context {context}: {step} tokens for each of {turns} turns; at least {16 * turns * 8 // 7 + 16} "
                "are needed, or fewer --turns"
            )
        if not 1 < parallel <= sessions:
            raise PlanError(f"--parallel {parallel}: from 2 to the number of --sessions, {sessions}, is needed")
        return cls(
            context=context,
            turns=turns,
            parallel=parallel,
            sessions=sessions,
            system=system,
            user=(step // 8, step // 2),
            answer=(4, step // 2),
            essay=(step, 3 * step),
            pool=int(ROOM * (PROMPTS * system + parallel * (context - system) // 2)),
        )
