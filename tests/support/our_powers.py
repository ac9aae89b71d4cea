"""The powers that fastopt's own function has computed."""

import pytest

from fastopt import portable


@pytest.fixture
def record(monkeypatch):
    """The arguments of the powers that our function computes during a test."""
    taken = []

    def raised(x, y):
        taken.append((float(x), float(y)))
        return portable.raised_slowly(x, y)

    monkeypatch.setattr(portable, "raised", raised)
    forget()
    yield taken
    forget()


def forget():
    """Forget the copies of functions, which hold the function that computes powers."""
    portable._functions.clear()
    portable._codes.clear()
