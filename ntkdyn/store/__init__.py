"""Recordings on disk; the only folder that imports h5py."""
