"""Quantisers of weights and activations, with straight-through gradients."""
