"""The results as tables for a terminal."""

from __future__ import annotations

__all__ = []
