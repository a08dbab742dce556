"""What a machine offers: devices, memory, threads."""
