"""Quantization-noise correction while sampling: noise statistics, the record, corrected schedulers, the fit."""

from quantdm.correction.collect import collect_
from quantdm.correction.corrected import corrected_class
from quantdm.correction.fit import choose_variant, fit_correction
from quantdm.correction.levels import SERVED
from quantdm.correction.precision import budgeted_bits, measured_bits, ptqd_bits, spec_of_steps
from quantdm.correction.record import Correction, load_correction
from quantdm.correction.schedulers import apply_correction, is_served, register_schedulers, remove_correction
from quantdm.correction.statistics import NoiseStatistics, for_guidance, statistics_from_pairs
from quantdm.correction.steps import step_table
from quantdm.correction.variants import RIVALS, VARIANTS

__all__ = [
    "RIVALS",
    "SERVED",
    "VARIANTS",
    "Correction",
    "NoiseStatistics",
    "apply_correction",
    "budgeted_bits",
    "choose_variant",
    "collect_",
    "corrected_class",
    "fit_correction",
    "for_guidance",
    "is_served",
    "load_correction",
    "measured_bits",
    "ptqd_bits",
    "register_schedulers",
    "remove_correction",
    "spec_of_steps",
    "statistics_from_pairs",
    "step_table",
]
