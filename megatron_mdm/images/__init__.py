"""Pictures as tokens: reading and showing them, image tokenizers, and their training."""
