"""What an initialization does to signal and gradient, measured layer by layer, and what masks connect."""
