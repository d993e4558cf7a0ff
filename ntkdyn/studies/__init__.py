"""Studies: one file per `analyze --only NAME`."""
