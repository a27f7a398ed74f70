"""Literal transcriptions of the papers' formulas: slow, plain, and the oracle of the tests."""

from __future__ import annotations
