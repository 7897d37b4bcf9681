"""Benchmarks: one module each with `def run(bench: Bench) -> None`; started by scripts/bench."""
