"""Measurements: each file one, run as ``python -m bench.NAME``; results go to bench/results/."""
