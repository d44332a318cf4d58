"""Ranks: layout, process groups, collectives, and everything that differs between CPU and CUDA."""
