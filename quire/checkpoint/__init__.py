"""Where models come from and how their tensors are read, by our names."""
