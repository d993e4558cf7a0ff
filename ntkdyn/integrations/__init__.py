"""Recorders in the loops of other frameworks, one module each; importing one imports its framework."""
