"""Writes keras_sparse_init/training/digits.npz, the embedded data set, from scikit-learn's copy of it.

Run once by hand: `.venv/bin/python tools/make_digits.py`. tests/test_data.py compares the file with scikit-learn's.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TARGET = Path(__file__).parents[1] / "keras_sparse_init" / "training" / "digits.npz"


def main() -> None:
    """Writes the images (0..16) and labels as bytes; the archive carries no date, so that it is reproducible."""
    digits = load_digits()
    np.savez_compressed(TARGET, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
