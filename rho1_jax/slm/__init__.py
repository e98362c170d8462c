"""The method: pure functions on arrays. Start reading at step.py."""
