"""The exact k-th largest magnitude: in programs by sampling and counting on bit patterns, never by sorting (`xla`,
`pallas`); of arrays at hand in a CPU's memory by numpy's quickselect (`host`)."""

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
