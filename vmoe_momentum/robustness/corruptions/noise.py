"""Noise, independent per channel."""

from typing import Any

import numpy as np

from .base import Draws, corruption, to_bytes


@corruption("noise", large=(0.08, 0.12, 0.18, 0.26, 0.38), small=(0.04, 0.06, 0.08, 0.09, 0.10))
def gaussian_noise(image: np.ndarray, sigma: float, rng: Draws) -> np.ndarray:
    """x + N(0, sigma^2)."""
    return to_bytes(image / 255 + rng.normal(0.0, sigma, image.shape))


@corruption("noise", large=(60, 25, 12, 5, 3), small=(500, 250, 100, 75, 50))
def shot_noise(image: np.ndarray, rate: float, rng: Draws) -> np.ndarray:
    """Poisson(x rate) / rate."""
    return to_bytes(rng.poisson(image / 255 * rate) / rate)


@corruption("noise", large=(0.03, 0.06, 0.09, 0.17, 0.27), small=(0.01, 0.02, 0.03, 0.05, 0.07))
def impulse_noise(image: np.ndarray, amount: float, rng: Draws) -> np.ndarray:
    """A share `amount` of values becomes black or white."""
    hit, salt = rng.random(image.shape) <= amount, rng.random(image.shape) <= 0.5
    return np.where(hit, np.where(salt, 255, 0), image).astype(np.uint8)


@corruption("extra", large=(0.15, 0.2, 0.35, 0.45, 0.6), small=(0.06, 0.1, 0.12, 0.16, 0.2))
def speckle_noise(image: np.ndarray, sigma: Any, rng: Draws) -> np.ndarray:
    """x + x N(0, sigma^2)."""
    x = image / 255
    return to_bytes(x + x * rng.normal(0.0, sigma, image.shape))
