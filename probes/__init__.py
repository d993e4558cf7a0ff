"""The probes that come with ntkdyn, one file each."""
