"""Judges the drop-in for PEFT: every fused call against PEFT's own forward, and PEFT's own tests with us and without."""
