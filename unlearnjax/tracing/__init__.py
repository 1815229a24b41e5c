"""Causal tracing: which activations, at which token and layer, carry a fact."""
