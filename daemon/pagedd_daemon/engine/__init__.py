"""The engine process: step loop, scheduler, samplers. Spawned by the front, one per model."""
