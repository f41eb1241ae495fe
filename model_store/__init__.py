"""Models as folders that vouch for themselves: manifest, digests, calibration, sessions."""
