"""Knows how to learn from a run directory how near to its card's roofline that run came, and where that is kept."""

from __future__ import annotations

from pathlib import Path


def learn(run: Path) -> str:
    """Reckon a run's efficiency, keep it, and say it."""
    raise NotImplementedError(run)
