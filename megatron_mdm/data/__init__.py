"""From files to clean micro-batches of token ids."""
