"""Studies: one file per ``analyze --only NAME``; each reads a Run or Sweep, calls analysis, and draws with plots."""
