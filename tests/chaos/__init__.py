"""Runs that are killed, robbed of their disk and damaged: python -m tests.chaos."""
