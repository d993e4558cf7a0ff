"""The empirical neural tangent kernel as a value."""
