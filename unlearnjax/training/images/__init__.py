"""Fine-tuning image models: many candidates of one start, under many settings."""
