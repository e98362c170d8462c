"""One Llama-family decoder, and what brings weights and tokenizers in and out."""
