"""Imported by files of tests that all need Numba: without it, they skip."""

import pytest

pytest.importorskip("numba", reason="Numba is not installed")
