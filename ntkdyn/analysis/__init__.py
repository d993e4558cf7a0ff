"""Measures on recorded arrays: pure functions, arrays in, arrays out."""
