"""Measures on recorded arrays: pure functions, arrays in, arrays out.

Names load on first use, so that importing one measure does not import scipy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "drift": (
        "Velocity",
        "constant_share",
        "distance_matrix",
        "kernel_angle",
        "kernel_distance",
        "kernel_distance_centered",
        "kernel_velocity",
        "relative_change",
    ),
    "alignment": ("cka", "hsic", "one_hot", "target_alignment", "target_alignment_full"),
    "spectrum": (
        "PowerLaw",
        "condition_number",
        "effective_rank",
        "eigenvalues",
        "intrinsic_rank",
        "participation_ratio",
        "power_law",
    ),
    "gating": (
        "EffectiveWidth",
        "core_shape",
        "effective_width",
        "flips",
        "gate_hamming",
        "settle_step",
        "unpack_pattern",
    ),
    "scaling": ("WidthExponent", "kernel_deviation", "kernel_spread", "width_exponent"),
    "power": ("correlation_power", "minimum_detectable_effect", "paired_power", "relation_power", "within_power"),
    "randomization": ("max_t", "sign_flip_test"),
    "agreement": ("cochran_q", "pool"),
    "arm_model": ("arm_models", "beyond_start_and_seed"),
    "mediation": ("family_ratio", "fieller", "judge_mediation"),
    "kernel_ridge": ("kernel_ridge_error",),
    "collapse": ("accuracy_at", "kept_and_lost", "standing", "steepest"),
    "ratios": ("invariance", "paired_ratio", "share_between", "spread_factor"),
    "advantage": ("equivalence", "interaction", "mean_interval", "paired_gap", "relation", "verdict"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .advantage import equivalence as equivalence
    from .advantage import interaction as interaction
    from .advantage import mean_interval as mean_interval
    from .advantage import paired_gap as paired_gap
    from .advantage import relation as relation
    from .advantage import verdict as verdict
    from .agreement import cochran_q as cochran_q
    from .agreement import pool as pool
    from .alignment import cka as cka
    from .alignment import hsic as hsic
    from .alignment import one_hot as one_hot
    from .alignment import target_alignment as target_alignment
    from .alignment import target_alignment_full as target_alignment_full
    from .arm_model import arm_models as arm_models
    from .arm_model import beyond_start_and_seed as beyond_start_and_seed
    from .collapse import accuracy_at as accuracy_at
    from .collapse import kept_and_lost as kept_and_lost
    from .collapse import standing as standing
    from .collapse import steepest as steepest
    from .drift import Velocity as Velocity
    from .drift import constant_share as constant_share
    from .drift import distance_matrix as distance_matrix
    from .drift import kernel_angle as kernel_angle
    from .drift import kernel_distance as kernel_distance
    from .drift import kernel_distance_centered as kernel_distance_centered
    from .drift import kernel_velocity as kernel_velocity
    from .drift import relative_change as relative_change
    from .gating import EffectiveWidth as EffectiveWidth
    from .gating import core_shape as core_shape
    from .gating import effective_width as effective_width
    from .gating import flips as flips
    from .gating import gate_hamming as gate_hamming
    from .gating import settle_step as settle_step
    from .gating import unpack_pattern as unpack_pattern
    from .kernel_ridge import kernel_ridge_error as kernel_ridge_error
    from .mediation import family_ratio as family_ratio
    from .mediation import fieller as fieller
    from .mediation import judge_mediation as judge_mediation
    from .power import correlation_power as correlation_power
    from .power import minimum_detectable_effect as minimum_detectable_effect
    from .power import paired_power as paired_power
    from .power import relation_power as relation_power
    from .power import within_power as within_power
    from .randomization import max_t as max_t
    from .randomization import sign_flip_test as sign_flip_test
    from .ratios import invariance as invariance
    from .ratios import paired_ratio as paired_ratio
    from .ratios import share_between as share_between
    from .ratios import spread_factor as spread_factor
    from .scaling import WidthExponent as WidthExponent
    from .scaling import kernel_deviation as kernel_deviation
    from .scaling import kernel_spread as kernel_spread
    from .scaling import width_exponent as width_exponent
    from .spectrum import PowerLaw as PowerLaw
    from .spectrum import condition_number as condition_number
    from .spectrum import effective_rank as effective_rank
    from .spectrum import eigenvalues as eigenvalues
    from .spectrum import intrinsic_rank as intrinsic_rank
    from .spectrum import participation_ratio as participation_ratio
    from .spectrum import power_law as power_law

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    raise AttributeError(f"module 'ntkdyn.analysis' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
