"""Reads other projects' files as parameters of interventions, and never runs code from them."""
