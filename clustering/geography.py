"""Where languages are spoken, by URIEL's `geo`: one point for each, as Glottolog has it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clustering import uriel
from clustering.distances import Distances
from clustering.languages import canonical_all

FARTHEST = 20_015.0
"""Kilometres between opposite points of a sphere of the Earth's mean radius, 6,371 km."""


def distances(languages: Sequence[str]) -> Distances:
    """Great-circle distances, as a share of the farthest that two points can be apart (20,015 km).

    One point is little for a language spoken on several continents. Distances of languages that
    URIEL does not place are unknown.
    """
    tags = canonical_all(languages)
    points = _unit_vectors(tags)
    placed = ~np.isnan(points).any(axis=1)
    known = np.outer(placed, placed)
    # From the chord, which unlike the cosine is exact for near points.
    chords = np.linalg.norm(points[:, None] - points, axis=-1)
    values = 2 * np.arcsin(np.clip(chords / 2, 0.0, 1.0)) / np.pi
    np.fill_diagonal(values, 0.0)
    return Distances(
        measure="geography",
        languages=tags,
        values=values,
        coverage=known.astype(float),
        parameters={"uriel_codes": uriel.codes_with_data(tags, "geo")},
        made_from=uriel.made_from("geo"),
    )


def coordinates(languages: Sequence[str]) -> Float[np.ndarray, "languages 2"]:
    """Latitude and longitude of each language, in degrees; NaN where URIEL has no place."""
    x, y, z = _unit_vectors(canonical_all(languages)).T
    return np.degrees(np.stack([np.arcsin(np.clip(z, -1, 1)), np.arctan2(y, x)], axis=1))


def _unit_vectors(tags: Sequence[str]) -> Float[np.ndarray, "languages 3"]:
    """Points on the unit sphere. URIEL has no coordinates but distances to 299 fixed points, whose
    names say where they are: the cosine of a distance is the product of two unit vectors."""
    shares, names = uriel.features(tags, "geo")
    places = np.array([name.split("_")[1:] for name in names], float)
    latitude, longitude = np.radians(places).T
    fixed = np.stack(
        [
            np.cos(latitude) * np.cos(longitude),
            np.cos(latitude) * np.sin(longitude),
            np.sin(latitude),
        ],
        axis=1,
    )
    cosines = np.nan_to_num(np.cos(np.pi * shares))
    points = np.linalg.lstsq(fixed, cosines.T, rcond=None)[0].T
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    # Codes that are no language (`mul`) are as far from everywhere, which is no point on a sphere.
    return np.where(lengths > 0.5, points / np.maximum(lengths, 0.5), np.nan)
