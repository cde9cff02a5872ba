"""Makes the engine fast on a CPU: packed weights, compiled layers, rewards in C++.

`paths` is imported by name, on a CPU only, by `device_paths`; nobody else knows this room. It may
use private parts of torch, and imports the engine's self-test and the rooms below, never `cuda`.
"""
