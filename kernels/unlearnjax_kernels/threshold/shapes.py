"""Shapes that the tests and the benchmarks of `threshold` share: name -> list of leaf shapes [N, ...]."""

SMALL: dict[str, list[tuple[int, ...]]] = {
    "one entry": [(1, 1)],
    "vector": [(2, 129)],
    "odd matrix": [(3, 7, 13)],
    "layers": [(2, 3, 8, 5)],
    "tree": [(2, 31), (2, 4, 9), (2, 1, 1, 1)],
}

LARGE: dict[str, list[tuple[int, ...]]] = {
    "8 x 4M": [(8, 4 << 20)],
    "2 x OLMo-1B mlp": [(2, 2048, 8192)],
    "30 x 1M": [(30, 1 << 20)],
}
