"""The C++ kernels: `native/` is compiled by `build`, opened by `library`, and is a set of `Kernels` in `kernels`."""
