"""The mathematics of interventions, on plain tensors. Imports torch only."""
