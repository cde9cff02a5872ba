"""Makes the engine fast on a GPU: Triton kernels, and decoding by replayed CUDA graphs.

`paths` is imported by name, on a GPU only, by `device_paths`; the attention's plan imports the
kernel for pages alike. Nobody else knows this room, which imports the engine's self-test and the
rooms below, never `cpu`.
"""
