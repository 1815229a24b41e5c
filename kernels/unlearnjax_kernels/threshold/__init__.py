"""The exact k-th largest magnitude, found by counting on bit patterns and never by sorting."""

from unlearnjax_kernels.threshold.api import (
    Search,
    count,
    kth_magnitude,
    magnitude_bits,
    narrow,
    search,
    to_float,
)

__all__ = ["Search", "count", "kth_magnitude", "magnitude_bits", "narrow", "search", "to_float"]
