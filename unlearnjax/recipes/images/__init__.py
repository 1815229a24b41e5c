"""Unlearning in image models: candidates are fine-tuned on what is to be forgotten, merged, and subtracted."""
