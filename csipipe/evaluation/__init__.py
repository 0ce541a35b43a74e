"""Figures of trained models on a test set, sample by sample: tables, JSON and a picture."""
