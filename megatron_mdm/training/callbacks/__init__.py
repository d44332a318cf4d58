"""Training callbacks: what watches a run, a file each; base.py says what one is."""
