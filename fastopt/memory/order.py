"""The numbers that cut arrays into pieces, for every backend.

``csrc/render.py`` reads them from this text and puts them into C, so each is a literal.
"""

# Sums are of float64, in an order that holds on every backend: each chunk of a segment
# by lanes, the lanes by halves, the chunks of a span one after the other, and then the
# spans. A span has up to SPAN chunks, so that no thread of a GPU has to add up all
# chunks of a large array.
CHUNK = 4096
LANES = 32
SPAN = 512

# Sums by rows and by columns are taken tile by tile. A tile is high enough that partial
# sums of columns are few, wide enough that those of rows are few, and small enough that
# a matrix has work for many threads.
TILE_ROWS = 512
TILE_COLUMNS = 2048

# In formats with scales, groups of this many elements share a scale.
GROUP = 64

# The numbers below change no bits, since elements do not depend on their neighbours.

# What a step does besides its rule works on blocks of this many elements: few enough to
# stay in the first cache.
BLOCK = 2048

# Blocks are smaller where streams are decoded, because the next block of each stream is
# fetched meanwhile (docs/performance.md).
ENCODED_BLOCK = 256

# Below this many elements in all, waking a second thread costs more than it saves.
SERIAL_BELOW = 32768

# From this many elements on, a thread's part starts with the few up to the end of a
# cache line on their own, so that no store of the rest crosses a line
# (docs/performance.md).
ALIGN_FROM = 4096
CACHE_LINE = 64  # bytes
