"""The training loop, checkpoints, schedules, tracking."""
