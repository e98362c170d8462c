"""Speed, memory and parity."""
