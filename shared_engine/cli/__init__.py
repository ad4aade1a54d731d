"""The command line: `nemoretriever serve`, `check`, `embed` and `evaluate`."""
