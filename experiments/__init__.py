"""Thin Hydra entry points, one per thing that a person runs. No mathematics here."""

import sys

from experiments.signals import exit_on_signals

if sys.argv[0] == "-m":  # as Python has it while it looks for the module to run: from here on imports take seconds
    exit_on_signals()
