"""Distances by place, from URIEL's set `geo`: one point for each language, as in Glottolog."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clustering import uriel
from clustering.distances import Distances
from clustering.languages import canonical_all


def distances(languages: Sequence[str]) -> Distances:
    """Great-circle distances, as a share of the largest on the Earth (20,015 km, half its girth).

    A language spoken on several continents has one point too. Distances of languages without a
    place in URIEL are unknown."""
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
    """Points on the unit sphere, from distances to 299 fixed points, which URIEL has instead of
    coordinates: the cosine of a distance is the product of two unit vectors. The names of the
    features have the coordinates of the fixed points."""
    shares, names = uriel.features(tags, "geo")
    places = np.array([name.split("_")[1:] for name in names], float)
    latitude, longitude = np.radians(places).T
    across = np.cos(latitude)
    fixed = np.array([across * np.cos(longitude), across * np.sin(longitude), np.sin(latitude)]).T
    cosines = np.nan_to_num(np.cos(np.pi * shares))
    points = np.linalg.lstsq(fixed, cosines.T, rcond=None)[0].T
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    # Codes of no language (`mul`) are equally far from all points, so no point on a sphere fits.
    return np.where(lengths > 0.5, points / np.maximum(lengths, 0.5), np.nan)
