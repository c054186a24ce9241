"""CPU kernels in C++ behind a plain C boundary; everything works without them, only slower."""
