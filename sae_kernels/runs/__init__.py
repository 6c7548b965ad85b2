"""A training run on disk: its folder, metric lines, checkpoints and loggers."""
