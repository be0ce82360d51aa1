"""The colours of pictures: a shade for each of a rank's stages, and kinds that stay apart for every eye."""

from __future__ import annotations

from itertools import combinations

import numpy
import pytest

from pp_runtime.orders.catalogue import build_order
from pp_runtime.pictures.palette import INK, LOOKS, stage_places
from pp_runtime.timing.simulation import simulate
from pp_runtime.timing.timeline import Timeline

# What a colour in linear RGB becomes for an eye that lacks one kind of cone (Machado et al., 2009, severity 1).
EYES = {
    "all cones": numpy.eye(3),
    "protanopia": numpy.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": numpy.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": numpy.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# Linear RGB to the cones' answers to OKLab, in which distances are about as large as they look (Ottosson, 2020).
CONES = numpy.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
OKLAB = numpy.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def linear(colour: str) -> numpy.ndarray:
    shares = numpy.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return numpy.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


def seen(colour: str, eye: str) -> numpy.ndarray:
    return OKLAB @ numpy.cbrt(CONES @ numpy.clip(EYES[eye] @ linear(colour), 0, 1))


def luminance(colour: str) -> float:
    return float(linear(colour) @ (0.2126, 0.7152, 0.0722))


def test_a_ranks_stages_have_shades_of_their_own_from_the_first_colour_to_the_last() -> None:
    look = LOOKS["F"]
    assert (look.shade(0.0), look.shade(1.0)) == look.shades
    timeline: Timeline = simulate(build_order("Interleaved1F1B", 2, 8, 4)[0]).timeline()
    places = stage_places([timeline])
    assert [places[stage] for stage in (1, 3, 5, 7)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert len({look.shade(place) for place in places.values()}) == 4


@pytest.mark.parametrize("eye", EYES)
def test_no_kind_of_compute_looks_like_another_in_any_shade(eye: str) -> None:
    for one, other in combinations("FBIW", 2):
        for first in (0.0, 0.5, 1.0):
            for second in (0.0, 0.5, 1.0):
                pair = LOOKS[one].shade(first), LOOKS[other].shade(second)
                apart = numpy.linalg.norm(seen(pair[0], eye) - seen(pair[1], eye))
                assert apart > 0.035, (one, other, pair)


@pytest.mark.parametrize("kind", "FBIW")
def test_numbers_are_readable_on_every_shade(kind: str) -> None:
    for place in (0.0, 0.5, 1.0):
        assert (luminance(LOOKS[kind].shade(place)) + 0.05) / (luminance(INK) + 0.05) >= 4.5
