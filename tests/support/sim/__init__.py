"""The daemon in simulated time: real front, real engine, one thread, one seed.

`world` puts it together; `tests/test_front_simulation.py` tells thousands of such worlds.
"""
