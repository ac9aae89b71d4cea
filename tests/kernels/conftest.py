"""Fixtures of several files of these tests."""

from cuda_stubbed import driver as driver
from cuda_stubbed import stub as stub
