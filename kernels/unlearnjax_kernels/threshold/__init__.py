"""The exact k-th largest magnitude, found by sampling and counting on bit patterns and never by sorting."""

from unlearnjax_kernels.threshold.api import (
    Sample,
    Search,
    aim,
    count,
    done,
    kth_magnitude,
    magnitude_bits,
    narrow,
    sample,
    search,
    to_float,
)

__all__ = [
    "Sample",
    "Search",
    "aim",
    "count",
    "done",
    "kth_magnitude",
    "magnitude_bits",
    "narrow",
    "sample",
    "search",
    "to_float",
]
