"""The command ``fastopt``."""
