"""Models as folders that vouch for themselves: manifest, digests, calibration, sessions."""

import os

# Nothing leaves the premises. From 1.29 ONNX Runtime's wheels for Linux report to Microsoft, and keep
# a device id and a queue of events in the user's cache folder. It reads this once, as it is imported:
# here, before any module of ours can do so. `disable_telemetry_events()` comes too late.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
