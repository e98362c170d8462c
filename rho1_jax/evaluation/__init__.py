"""What a model is worth: held-out losses, benchmarks, and what a selection keeps."""
