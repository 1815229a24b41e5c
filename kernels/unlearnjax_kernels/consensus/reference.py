"""Sign consensus in numpy: what the other back ends must equal."""

import numpy as np


def consensus(
    deltas: np.ndarray, weights: np.ndarray, needed: int, agreeing: bool = False, conflict: bool = False
) -> np.ndarray:
    """See `api.consensus`."""
    w = weights.astype(np.float32).reshape(-1, *(1,) * (deltas.ndim - 1))
    x = w * deltas.astype(np.float32)
    ups, downs = np.sum(x > 0, axis=0), np.sum(x < 0, axis=0)
    up, down = ups >= needed, downs >= needed
    strength = np.broadcast_to(np.abs(w), x.shape)
    if agreeing:
        counted = np.where(up, x > 0, x < 0)
        x, strength = np.where(counted, x, np.float32(0)), np.where(counted, strength, np.float32(0))
    total, share = (np.sum(part, axis=0, dtype=np.float32) for part in (x, strength))
    kept = ~(up | down) if conflict else (up & (total > 0)) | (down & (total < 0))
    return np.where(kept, total / np.where(share == 0, np.float32(1), share), np.float32(0)).astype(np.float32)
