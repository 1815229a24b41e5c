"""Shapes [N, ...] that the tests and the benchmarks of `ties` share."""

SMALL: dict[str, tuple[int, ...]] = {
    "one entry": (1, 1),
    "vector": (2, 129),
    "odd matrix": (3, 7, 13),
    "layers": (8, 3, 16, 40),
    "several blocks": (8, 60, 1024),
}

LARGE: dict[str, tuple[int, ...]] = {
    "8 x 4M": (8, 4 << 20),
    "2 x OLMo-1B mlp": (2, 2048, 8192),
    "30 x 1M": (30, 1 << 20),
}
