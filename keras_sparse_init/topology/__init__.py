"""What the masks of a model connect: paths of unmasked weights from its inputs to its outputs."""
