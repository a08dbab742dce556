"""The engine: what users see of it, and the core that knows the device. Knows no HTTP."""
