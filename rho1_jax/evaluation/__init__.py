"""What a model is worth: held-out losses (and, in time, benchmark tasks)."""
