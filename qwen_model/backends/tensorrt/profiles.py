"""Give a builder the two optimization profiles of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...network.inputs import NetworkInput, profile_shapes


def add_profiles(builder: Any, builder_config: Any, inputs: Mapping[str, NetworkInput]) -> None:
    """Add the profiles of decode steps and of prompts, whose indices are `loading.DECODE` and `loading.PREFILL`."""
    for shapes in profile_shapes(inputs):
        profile = builder.create_optimization_profile()
        for name, (least, typical, most) in shapes.items():
            profile.set_shape(name, least, typical, most)
        builder_config.add_optimization_profile(profile)
