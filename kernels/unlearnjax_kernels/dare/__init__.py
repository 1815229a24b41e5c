"""Random keeping of entries whose drops depend on nothing but the seed, the candidate and the entry's place."""

from unlearnjax_kernels.dare.api import Part, bits, drop, kept, places

__all__ = ["Part", "bits", "drop", "kept", "places"]
