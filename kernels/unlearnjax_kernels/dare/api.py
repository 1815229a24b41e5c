"""Random keeping as the rest of the code calls it.

    bits(seed, candidate, places)            uniform uint32 per entry
    kept(seed, candidate, places, density)   True with probability `density`
    places(shape, part)                      the entries' places in their whole tensor

Where an entry lies on a mesh or in a stream does not matter: its bits are a function of its place. One fusion writes
nothing but what it is used in, on every back end, so there is no other implementation than XLA's; `reference` is what
it must equal.
"""

from unlearnjax_kernels.dare.xla import Part, bits, kept, places

__all__ = ["Part", "bits", "kept", "places"]
