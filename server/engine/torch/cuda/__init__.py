"""Makes the engine fast on a GPU: Triton kernels, and decoding by replayed CUDA graphs.

On a GPU only, `fast_paths` imports `fast_path` by its name, and `attention.plan` the kernel for
pages. No other module imports this package. It may import most of the torch engine, but not `cpu`.
"""
