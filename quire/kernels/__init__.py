"""Operations: each a reference in plain torch, with faster kernels registered beside it."""
