"""Measurements of pagedd. Each prints a table and writes `results/TARGET-MACHINE.json`."""
