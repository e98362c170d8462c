"""The training loop and what it stands on: optimizer, sharding, checkpoints, metrics."""
