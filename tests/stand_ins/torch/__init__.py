"""A stand-in for torch on nodes of the emulated cluster, which has neither memory nor cores for 256 real ranks."""
