"""What ``benchmarks/gpu.py`` measures: a module for each part, run in a process of its own."""
