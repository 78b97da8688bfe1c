"""Initializers side by side on one stack of affine layers."""
