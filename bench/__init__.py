"""The measurements: ``python -m bench`` prints figures and ratios side by side, all of one run on one machine."""
