"""The experiments that come with ntkdyn, one file each."""
