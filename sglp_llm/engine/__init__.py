"""Runs decoder layers over the calibration set and lets observers watch."""
