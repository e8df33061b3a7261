"""The machine that the process runs on: what its devices are, clocks, errors of a device, the cache folder."""
