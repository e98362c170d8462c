"""Task definitions for lm-eval."""
