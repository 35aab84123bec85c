"""Shared by the trust benchmarks: writes in child processes that are killed, cut off or refused."""
