"""What a run leaves on disk, and how it survives: its folder, metric lines, checkpoints."""
