"""Model zoos the benchmarks run on, each built by a script from public packages."""
