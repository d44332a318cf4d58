"""Sections of the configuration that have a file of their own; schema.py has the others and the whole."""
