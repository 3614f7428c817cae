"""Bursts of readers over HTTP or on an emulated device: the policies, their parts, the simulator beside them."""
