"""The mathematics of interventions, on plain tensors. Imports torch only, and Triton for GPUs."""
