"""The mathematics of interventions, on plain tensors. Imports torch, and Triton for GPUs."""
