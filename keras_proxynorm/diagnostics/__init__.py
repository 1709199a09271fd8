"""Measures what normalization does to a network: collapse, signal propagation, the loss landscape."""

from keras_proxynorm.diagnostics.callbacks import LogLossLandscape
from keras_proxynorm.diagnostics.callbacks import LogPowerDecomposition
from keras_proxynorm.diagnostics.callbacks import LogSignalPropagation
from keras_proxynorm.diagnostics.collapse import CollapseReport
from keras_proxynorm.diagnostics.collapse import Finding
from keras_proxynorm.diagnostics.collapse import collapse_report
from keras_proxynorm.diagnostics.landscape import LossLandscape
from keras_proxynorm.diagnostics.landscape import loss_landscape
from keras_proxynorm.diagnostics.power import PowerDecomposition
from keras_proxynorm.diagnostics.power import power_decomposition
from keras_proxynorm.diagnostics.propagation import SignalPropagation
from keras_proxynorm.diagnostics.propagation import signal_propagation

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
