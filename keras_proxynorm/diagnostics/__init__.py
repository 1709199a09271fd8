"""Measures what normalization does to a network: collapse, signal propagation, the loss landscape."""

from keras_proxynorm.diagnostics.callbacks import LogLossLandscape, LogPowerDecomposition, LogSignalPropagation
from keras_proxynorm.diagnostics.collapse import CollapseReport, Finding, collapse_report
from keras_proxynorm.diagnostics.landscape import LossLandscape, loss_landscape
from keras_proxynorm.diagnostics.power import PowerDecomposition, power_decomposition
from keras_proxynorm.diagnostics.propagation import SignalPropagation, signal_propagation

__all__ = [
    "CollapseReport",
    "Finding",
    "LogLossLandscape",
    "LogPowerDecomposition",
    "LogSignalPropagation",
    "LossLandscape",
    "PowerDecomposition",
    "SignalPropagation",
    "collapse_report",
    "loss_landscape",
    "power_decomposition",
    "signal_propagation",
]
