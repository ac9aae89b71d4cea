"""Benchmarks run one after another: at once, they would disturb each other."""


def pytest_xdist_auto_num_workers():
    return 0
