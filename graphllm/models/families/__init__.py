"""One small declaration a model family: architecture names, configuration, weight names."""
