"""Image models: classifiers as pure functions of parameters, statistics and images."""
