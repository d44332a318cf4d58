"""From prompts to responses by iterative unmasking."""
