from typing import Any

ISA: str
TABLE: Any  # a capsule
