"""Makes the engine fast on a CPU: packed weights and compiled layers.

Only `fast_paths` imports this room: it imports `fast_path` by name, on a CPU only. The room may use
private parts of torch, and imports the engine's self-test and the rooms below, never `cuda`.
"""
