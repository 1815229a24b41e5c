"""Named shapes shared by the tests and the benchmarks: (tokens, hidden size, vocabulary, chunk)."""

SMALL = {
    "one_chunk": (5, 16, 40, 64),
    "even_chunks": (7, 16, 96, 32),
    "ragged_last_chunk": (7, 24, 101, 32),
    "one_token": (1, 8, 33, 8),
}
BENCH = {
    "small_model": (2048, 256, 4096, 4096),
    "olmo_1b_step": (1024, 2048, 50304, 8192),
}
