"""How far results may differ, and comparisons that use it."""
