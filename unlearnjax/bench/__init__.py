"""Throughput on the user's own device or pod: merges against its copy bandwidth, and candidate training."""
