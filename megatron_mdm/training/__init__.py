"""A run: set up, calibrate, train, watch, save, resume."""
