"""Where cells run: in this process, in one a device, or in a cluster."""
