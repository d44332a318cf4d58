"""Numbers as pictures and tables."""
