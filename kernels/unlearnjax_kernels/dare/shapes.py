"""Shapes that the tests and the benchmarks of `dare` share: name -> shape of one tensor."""

SMALL: dict[str, tuple[int, ...]] = {"scalar": (), "vector": (129,), "matrix": (7, 13), "layers": (3, 8, 5)}
LARGE: dict[str, tuple[int, ...]] = {"4M": (4 << 20,), "OLMo-1B mlp": (2048, 8192)}
