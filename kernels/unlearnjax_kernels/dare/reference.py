"""The counter-based bits in numpy: a mixer of 32-bit words applied to an entry's place, with the seed between."""

import numpy as np


def mixed(x: np.ndarray) -> np.ndarray:
    """One 32-bit mixer: xor-shifts and multiplications modulo 2^32 (the constants of Wellons' `lowbias32`)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def bits(seed: np.ndarray, candidate: int, places: np.ndarray) -> np.ndarray:
    """Uniform uint32 for each place: mixed(mixed(place ^ seed[0]) + mixed(candidate ^ seed[1]))."""
    own = mixed(np.asarray([candidate], np.uint32) ^ seed[1])
    return mixed(mixed(places.astype(np.uint32) ^ seed[0]) + own)


def kept(seed: np.ndarray, candidate: int, places: np.ndarray, density: float) -> np.ndarray:
    """Whether each entry stays: with probability `density`, up to 2^-32; all of them at 1."""
    if density >= 1:
        return np.ones(places.shape, bool)
    return bits(seed, candidate, places) < np.uint32(np.float32(density) * np.float32(2**32))


def drop(x: np.ndarray, seed: np.ndarray, candidate: int, density: float, start: int = 0) -> np.ndarray:
    """See `api.drop`."""
    places = (np.arange(x.size, dtype=np.uint32) + np.uint32(start)).reshape(x.shape)
    return np.where(kept(seed, candidate, places, density), x, np.zeros((), x.dtype))
