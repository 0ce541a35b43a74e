"""Figures of a model and of a rank: losses and NMSE, their sums, where time goes, probes."""
