"""Array operations that unlearnjax needs and no library has: arrays in, arrays out, nothing imported from unlearnjax.

One folder per operation: `reference.py` (numpy, obvious), `xla.py`, `shapes.py` (the shapes that tests and benchmarks
share) and `api.py`, which picks an implementation.
"""
