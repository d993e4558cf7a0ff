"""Layer rules of the layerwise engine, one file per layer family."""
