"""Weights and tokenizers in and out: folders of runs and of Hugging Face, GGUF files."""
