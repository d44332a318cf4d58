"""Benchmarks: python -m tools.benchmarks NAME …"""
