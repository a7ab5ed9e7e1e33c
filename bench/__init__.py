"""Measuring: imports everything, nothing imports it."""
